"""`prism landscape`: corners score as the models themselves, points are the formula's, a killed walk goes on, what does not fit is refused."""

import json
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from prism_command import prism
from safetensors.torch import load_file, save_file
from tiny_hf import make_tiny_model
from tiny_shards import DOCUMENTS

from megatron_prism import artifact
from megatron_prism.analysis.landscape import Place, on_path
from megatron_prism.config import load_recipe, validate
from megatron_prism.errors import UserError
from megatron_prism.evals.ranks import Ranks
from megatron_prism.stages import convert, evaluate, landscape, prep

WEIGHTS = "model.safetensors"
TINY = Path(__file__).parents[2] / "examples" / "tiny"
SCORER = """
from pathlib import Path
from safetensors.torch import load_file

def total(folder):
    with (Path(__file__).parent / "asked.txt").open("a") as file:
        print(folder.parent.name, file=file)
    return {"sum": sum(float(tensor.double().sum()) for tensor in load_file(folder / "model.safetensors").values())}

def words(folder):
    return {"rhymes": "many"}

def several(folder):
    import numpy
    return {"rhymes": numpy.array([0.5, 0.5])}

def overflow(folder):
    return {"loss": float("inf")}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tiny models in fp32, a prep output `data`, a task file, and a module with scorers."""
    folder = tmp_path_factory.mktemp("landscape")
    for seed, name in enumerate(("base", "midtrain", "rl")):
        make_tiny_model(folder / name, seed=seed)
    lines = [json.dumps({"text": f"{number}: {text}"}) for number in range(8) for text in DOCUMENTS]
    (folder / "prose.jsonl").write_text("\n".join(lines) + "\n")
    source = [{"name": "prose", "domain": "prose", "weight": 1.0, "paths": [str(folder / "prose.jsonl")]}]
    recipe = {"output": str(folder / "data"), "tokenizer": str(folder / "base"), "source": source, "validation_fraction": 0.3, "workers": 1}
    prep.run(validate(recipe, prep.Config, where="test"))
    (folder / "sums.toml").write_text('name = "sums"\ndomain = "math"\ndataset = "chain_sum"\nnum_questions = 4\nmax_new_tokens = 8\n')
    (folder / "own_scores.py").write_text(SCORER)
    return folder


@pytest.fixture(autouse=True)
def _importable(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(place))
    (place / "asked.txt").unlink(missing_ok=True)


def recipe(place: Path, output: Path, **values: Any) -> dict[str, Any]:
    return {**{name: str(place / name) for name in ("base", "midtrain", "rl")}, "output": str(output), "threads": 1, **values}


def config(place: Path, output: Path, **values: Any) -> landscape.Config:
    return validate(recipe(place, output, **values), landscape.Config, "test")


def scored(place: Path, output: Path, **values: Any) -> dict[str, Any]:
    folder = landscape.run(config(place, output, **values))
    artifact.require(folder, "landscape")
    return json.loads((folder / "landscape.json").read_text())


def by_place(found: dict[str, Any]) -> dict[tuple[float, float], dict[str, Any]]:
    return {(point["alpha"], point["beta"]): point["scores"] for point in found["points"]}


def asked(place: Path) -> list[str]:
    path = place / "asked.txt"
    return path.read_text().split() if path.is_file() else []


def evaluation(place: Path) -> dict[str, Any]:
    blend = {"blend": str(place / "data"), "seq_len": 16, "batch_size": 4}
    tasks = {"names": [str(place / "sums.toml")], "grading_workers": 0}
    return {"perplexity": blend, "tasks": tasks, "generation": {"temperature": 1.0, "n": 2}}


def test_corners_score_exactly_as_the_models_and_points_between_do_not(place, tmp_path):
    found = by_place(scored(place, tmp_path / "out", path={"points": 2}, grid={"alpha": [0, 1], "beta": [0, 1]}, **evaluation(place)))
    models = [{"name": name, "path": str(place / name)} for name in ("base", "midtrain", "rl")]
    request = {"output": str(tmp_path / "scores"), "models": models, **evaluation(place)}
    folder = evaluate.run(validate(request, evaluate.Config, "test"))
    alone = json.loads((folder / "scores.json").read_text())["models"]
    assert len(found) == 4, "the path's points are the grid's corners, and are scored once"
    for name, corner in (("base", (0, 0)), ("midtrain", (1, 0)), ("rl", (1, 1))):
        own, here = alone[name], found[corner]
        assert here["loss/prose"]["value"] == own["perplexity"]["domains"]["prose"]["loss"]
        assert here["accuracy/sums"] == {"value": own["tasks"]["sums"]["accuracy"], "error": own["tasks"]["sums"]["standard_error"]}
        texts = [
            (tmp_path / run / "responses" / one / "sums.jsonl.zst").read_bytes() for run, one in (("out", Place.of(*corner).name), ("scores", name))
        ]
        assert [record["text"] for record in _records(texts[0])] == [record["text"] for record in _records(texts[1])]
    losses = [scores["loss/prose"]["value"] for scores in found.values()]
    assert len(set(losses)) == 4


def _records(content: bytes) -> list[dict[str, Any]]:
    import zstandard

    text = zstandard.ZstdDecompressor().stream_reader(content, read_across_frames=True).read().decode()
    return [json.loads(line) for line in text.splitlines()]


def test_every_point_is_what_the_formula_says_beyond_the_models_too(place, tmp_path):
    """By a scorer of one's own: the sum of all weights is linear in alpha and beta."""
    found = scored(place, tmp_path / "out", scorer="own_scores.total", grid={"alpha": [-0.5, 0.3, 2], "beta": [-1, 0, 1.5]}, keep=True)
    tensors = [load_file(place / name / WEIGHTS) for name in ("base", "midtrain", "rl")]
    base, midtrain, rl = (sum(float(tensor.double().sum()) for tensor in one.values()) for one in tensors)
    for (alpha, beta), scores in by_place(found).items():
        assert scores["scorer/sum"]["value"] == pytest.approx(base + alpha * (midtrain - base) + beta * (rl - midtrain), abs=1e-3)
    name = "model.layers.1.mlp.up_proj.weight"
    merged = load_file(tmp_path / "out" / "models" / Place.of(2, -1).name / WEIGHTS)[name]
    parts = [one[name].double() for one in tensors]
    torch.testing.assert_close(merged.double(), -1 * parts[0] + 3 * parts[1] - 1 * parts[2], rtol=0, atol=2e-6)
    assert found["figures"] == [{"name": "scorer/sum", "label": "sum", "factor": 1}]
    assert found["grid"]["points"] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]] and found["path"] is None


def test_one_merged_model_at_a_time_is_on_disk_and_none_at_the_end(place, tmp_path, monkeypatch):
    from megatron_prism.analysis import landscape_points

    counts, write = [], landscape_points.Models.write

    def counted(self, point, output, dtype):
        write(self, point, output, dtype)
        counts.append(len(list((tmp_path / "out").rglob(WEIGHTS))))

    monkeypatch.setattr(landscape_points.Models, "write", counted)
    scored(place, tmp_path / "out", scorer="own_scores.total", path={"points": 3})
    assert counts == [1] * 5 and not list((tmp_path / "out").rglob(WEIGHTS))
    (tmp_path / "out" / "COMPLETE").unlink()
    (tmp_path / "out" / "points" / f"{on_path(2).name}.json").unlink()
    for left in ("a0.0_b0.0/model_of_others", f"{on_path(2).name}/.model_half.0123.tmp"):
        (tmp_path / "out" / "parts" / left).mkdir(parents=True)
        (tmp_path / "out" / "parts" / left / WEIGHTS).touch()
    scored(place, tmp_path / "out", scorer="own_scores.total", path={"points": 3})
    assert counts == [1] * 6, "what killed sessions left is gone before the next point is written"


def test_without_an_rl_model_the_path_ends_at_the_mid_trained_one(place, tmp_path):
    found = scored(place, tmp_path / "out", rl=None, scorer="own_scores.total", path={"at": [1, 0, 0.5, -1]})
    assert [(stop["position"], found["points"][stop["point"]]["alpha"]) for stop in found["path"]] == [(-1, -1), (0, 0), (0.5, 0.5), (1, 1)]
    assert [point["weights"] for point in found["points"]] == [[2, -1], [1, 0], [0.5, 0.5], [0, 1]]


def test_a_walk_that_was_killed_goes_on_and_scores_no_point_twice(place, tmp_path):
    """Killed with -9 by the scorer itself at its third point, then started again."""
    (place / "killer.py").write_text(
        "import os, signal\nfrom own_scores import total as counted\n\n"
        "def total(folder):\n"
        "    found = counted(folder)\n"
        f"    if len(open({str(place / 'asked.txt')!r}).read().split()) == 3:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return found\n"
    )
    given = recipe(place, tmp_path / "out", scorer="killer.total", path={"points": 3}, tasks=evaluation(place)["tasks"])
    words = [f"{key}={json.dumps(value)}" for key, value in given.items() if not isinstance(value, dict)]
    (tmp_path / "recipe.toml").write_text(f"[path]\npoints = 3\n[tasks]\nnames = [{str(place / 'sums.toml')!r}]\ngrading_workers = 0\n")
    killed = prism("landscape", tmp_path / "recipe.toml", *words, env={"PYTHONPATH": str(place)}, timeout=280)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list((tmp_path / "out" / "points").iterdir())) == 2 and len(list((tmp_path / "out").rglob(WEIGHTS))) == 1
    found = scored(place, tmp_path / "out", scorer="killer.total", path={"points": 3}, tasks=evaluation(place)["tasks"])
    names = [on_path(position).name for position in (0, 0.5, 1, 1.5, 2)]
    assert asked(place) == [*names[:3], names[2], *names[3:]], "the point that was killed is asked once more, no other is"
    (place / "asked.txt").unlink()
    whole = scored(place, tmp_path / "whole", scorer="own_scores.total", path={"points": 3}, tasks=evaluation(place)["tasks"])
    assert by_place(whole) == by_place(found)


def test_a_finished_landscape_is_not_made_again_and_a_changed_model_is_noticed(place, tmp_path):
    shutil.copytree(place / "midtrain", tmp_path / "midtrain")
    given = {"midtrain": str(tmp_path / "midtrain"), "scorer": "own_scores.total", "path": {"points": 2}}
    scored(place, tmp_path / "out", **given)
    scored(place, tmp_path / "out", **given)
    assert len(asked(place)) == 3
    tensors = load_file(tmp_path / "midtrain" / WEIGHTS)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, tmp_path / "midtrain" / WEIGHTS, metadata={"format": "pt"})
    scored(place, tmp_path / "out", **given)
    assert len(asked(place)) == 6


def test_points_are_scored_again_where_a_task_or_the_scorer_changed(place, tmp_path, monkeypatch):
    """Of a finished landscape, and of one that is not; how many responses are drawn at a time is no such change."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine.py").write_text("from own_scores import total\n")
    (tmp_path / "sums.toml").write_text((place / "sums.toml").read_text())
    given = {"rl": None, "path": {"points": 2}, "scorer": "mine.total", "tasks": {"names": [str(tmp_path / "sums.toml")], "grading_workers": 0}}
    first = scored(place, tmp_path / "out", **given)
    (tmp_path / "mine.py").write_text("from own_scores import total  # otherwise\n")
    scored(place, tmp_path / "out", **given)
    assert len(asked(place)) == 4
    (tmp_path / "sums.toml").write_text((place / "sums.toml").read_text().replace("num_questions = 4", "num_questions = 3"))
    second = scored(place, tmp_path / "out", **given)
    assert len(asked(place)) == 6 and second["asked_as"] != first["asked_as"]
    (tmp_path / "out" / "COMPLETE").unlink()
    scored(place, tmp_path / "out", **given, generation={"batch_size": 2})
    assert len(asked(place)) == 6
    (tmp_path / "out" / "COMPLETE").unlink()
    scored(place, tmp_path / "out", **given, generation={"max_new_tokens": 2})
    assert len(asked(place)) == 8


def test_models_are_kept_where_that_is_asked_for_later(place, tmp_path):
    given = {"rl": None, "path": {"points": 2}, "scorer": "own_scores.total"}
    before = scored(place, tmp_path / "out", **given)
    (tmp_path / "out" / "COMPLETE").unlink()
    assert scored(place, tmp_path / "out", **given, keep=True) == before
    assert sorted(path.parent.name for path in (tmp_path / "out" / "models").rglob(WEIGHTS)) == [on_path(0).name, on_path(1).name]
    assert len(asked(place)) == 4
    (tmp_path / "out" / "COMPLETE").unlink()
    scored(place, tmp_path / "out", **given, keep=True)
    assert len(asked(place)) == 4, "kept models are not made twice"


def test_two_ranks_score_as_one_does(place, tmp_path, monkeypatch):
    """Ranks share nothing but the folder, so two threads stand for two processes."""
    given = {"path": {"points": 2}, **evaluation(place)}
    one = scored(place, tmp_path / "one", **given)
    asked = config(place, tmp_path / "two", **given)
    monkeypatch.setattr(Ranks, "of_environment", lambda output, patience: Ranks(output, int(threading.current_thread().name), 2, patience))
    ranks = [threading.Thread(target=landscape.run, args=(asked,), name=str(rank)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=120)
    artifact.require(tmp_path / "two", "landscape")
    assert by_place(json.loads((tmp_path / "two" / "landscape.json").read_text())) == by_place(one)
    assert not (tmp_path / "two" / "parts").exists()


def test_models_of_any_form_give_the_same_landscape(place, tmp_path):
    folders = scored(place, tmp_path / "folders", scorer="own_scores.total", path={"points": 3})
    imported = convert.run(
        validate({"direction": "import", "source": str(place / "rl"), "output": str(tmp_path / "rl"), "tp": 2}, convert.Config, "test")
    )
    assert by_place(scored(place, tmp_path / "mixed", rl=str(imported), scorer="own_scores.total", path={"points": 3})) == by_place(folders)


def test_what_is_no_number_has_no_score(place, tmp_path):
    found = scored(place, tmp_path / "out", scorer="own_scores.overflow", path={"points": 2})
    assert [point["scores"] for point in found["points"]] == [{"scorer/loss": None}] * 3
    assert "Infinity" not in (tmp_path / "out" / "landscape.json").read_text()
    for name in ("words", "several"):
        with pytest.raises(UserError, match=rf"scorer=own_scores.{name} gave .* at alpha=0.0, beta=0.0; it must return names with numbers"):
            scored(place, tmp_path / name, scorer=f"own_scores.{name}", path={"points": 2})


def test_a_page_shows_the_path_and_the_map_and_needs_nothing_else(place, tmp_path):
    scored(place, tmp_path / "out", scorer="own_scores.total", path={"points": 3}, grid={"alpha": [0, 1], "beta": [0, 1]})
    page = (tmp_path / "out" / "landscape.html").read_text()
    assert page.count("<svg") == 2 and "along the path" in page and "alpha (share of mid-training)" in page
    assert "src=" not in page and "href=" not in page and "after RL" in page


def test_weights_that_are_not_finite_are_named_before_the_first_point(place, tmp_path):
    shutil.copytree(place / "rl", tmp_path / "rl")
    tensors = load_file(tmp_path / "rl" / WEIGHTS)
    tensors["model.layers.0.mlp.down_proj.weight"][1, :3] = float("nan")
    save_file(tensors, tmp_path / "rl" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model rl \(.*\): model.layers.0.mlp.down_proj.weight holds 3 values that are NaN or infinite"):
        scored(place, tmp_path / "out", rl=str(tmp_path / "rl"), scorer="own_scores.total", path={"points": 2})
    assert not asked(place)


def test_models_that_do_not_belong_together_are_refused_before_anything_is_written(place, tmp_path):
    make_tiny_model(tmp_path / "deep", num_hidden_layers=3)
    make_tiny_model(tmp_path / "words")
    edited = json.loads((tmp_path / "words" / "tokenizer.json").read_text())
    edited["model"]["merges"] = edited["model"]["merges"][::-1]
    (tmp_path / "words" / "tokenizer.json").write_text(json.dumps(edited))
    for rl, message in (
        (tmp_path / "deep", "models base .* and rl .* cannot be compared: num_layers is 2 and 3"),
        (tmp_path / "words", "models base .* and rl .* have different tokenizers"),
        (place / "midtrain", "rl and midtrain are one model|midtrain and rl are one model"),
        (tmp_path / "none", "rl=.* is no folder"),
    ):
        with pytest.raises(UserError, match=message):
            scored(place, tmp_path / "out", rl=str(rl), scorer="own_scores.total", path={})
    with pytest.raises(UserError, match=r"holds .*, which is read; choose another output"):
        scored(place, place, scorer="own_scores.total", path={})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scorer": "own_scores.total"}, "there are no points: give a \\[path\\] table"),
        ({"path": {}}, "there is nothing to score by"),
        ({"scorer": "own_scores.total", "grid": {}, "rl": None}, "grid: beta is the share of RL's update, and rl is not given"),
        ({"scorer": "own_scores.total", "path": {"at": [0, 1.5]}, "rl": None}, "positions behind 1 lie towards the model after RL"),
        ({"scorer": "own_scores.total", "path": {}, "rl": None, "like": "rl"}, "like=rl needs rl"),
        ({"scorer": "own_scores.total", "grid": {"alpha": [1, 0]}}, "alpha=\\[1.0, 0.0\\] must ascend; try alpha=\\[0.0, 1.0\\]"),
        ({"scorer": "own_scores.total", "path": {"points": 1}}, "points"),
        ({"scorer": "own_scores.total", "path": {"at": []}}, "path.at"),
        ({"scorer": "own_scores.nothing", "path": {}}, "own_scores has no function nothing"),
        ({"scorer": "no_such.thing", "path": {}}, "there is no module no_such; put its folder on PYTHONPATH"),
    ],
)
def test_recipes_that_cannot_work_are_refused(place, tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        scored(place, tmp_path / "out", **values)


def test_the_tiny_example_is_a_path_and_with_rl_a_map_too():
    assert len(load_recipe(TINY / "landscape.toml", [], landscape.Config).places) == 5
    assert len(load_recipe(TINY / "landscape.toml", ["rl=runs/tiny/rl", "grid={}"], landscape.Config).places) == 25


def test_a_model_that_is_asked_otherwise_than_by_itself_is_named(place, tmp_path):
    shutil.copytree(place / "base", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ messages }}")
    found = scored(place, tmp_path / "out", base=str(tmp_path / "base"), scorer="own_scores.total", path={"points": 2})
    assert found["notes"] == ["base is scored as midtrain is asked, not as by itself: they have other chat templates (of base and of midtrain)."]
    assert not scored(place, tmp_path / "alike", scorer="own_scores.total", path={"points": 2})["notes"]
