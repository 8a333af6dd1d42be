"""`prism cka`: planted likenesses are found, what was computed is not computed again, what cannot be compared is refused by name."""

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prism_command import prism
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny

from megatron_prism import artifact
from megatron_prism.analysis import cka_run
from megatron_prism.config import load_recipe, validate
from megatron_prism.errors import UserError
from megatron_prism.evals.models import fingerprint
from megatron_prism.stages import cka, convert

WEIGHTS = "model.safetensors"
INPUTS, SIZE = 24, 12


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Two models each of a dense and a hybrid family, and texts for them: words that their tokenizer knows."""
    root = tmp_path_factory.mktemp("models")
    for name in ("llama", "granite_hybrid"):
        for seed in (0, 1):
            write_tiny(name, root / f"{name}{seed}", seed=seed)
    write_texts(root)
    return root


def write_texts(root: Path) -> None:
    generator = np.random.default_rng(0)
    texts = [" ".join(f"w{word}" for word in generator.integers(3, 97, generator.integers(4, 30))) for _ in range(2 * INPUTS)]
    (root / "text.txt").write_text("\n\n".join(texts) + "\n\nw3\n")
    (root / "questions.jsonl").write_text("".join(json.dumps({"question": text[::-1]}) + "\n" for text in texts))


def config(root: Path, output: Path, *folders: Path, **values: Any) -> cka.Config:
    content = {
        "models": [{"name": f"m{place}", "path": str(folder)} for place, folder in enumerate(folders)],
        "sets": [{"name": "text", "files": [str(root / "text.txt")], "min_characters": 5}],
        "inputs": INPUTS,
        "max_tokens": 64,
        "bootstrap": {"size": SIZE, "draws": 5},
        "output": str(output),
    }
    return validate({**content, **values}, cka.Config, "test")


def compared(*arguments: Any, **values: Any) -> dict[str, Any]:
    return json.loads((cka.run(config(*arguments, **values)) / "cka.json").read_text())


def changed(source: Path, output: Path, change: Any) -> Path:
    """A copy of a folder whose tensors went through `change(tensors)`."""
    shutil.copytree(source, output)
    tensors = load_file(output / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, output / WEIGHTS, metadata={"format": "pt"})
    return output


@pytest.mark.parametrize("name", ["llama", "granite_hybrid"])
def test_a_model_against_a_copy_of_itself_is_exactly_1_at_every_layer(models, tmp_path, name):
    copy = changed(models / f"{name}0", tmp_path / "copy", lambda tensors: None)
    checkpoint = convert.run(convert.Config(direction="import", source=copy, output=tmp_path / "checkpoint", tp=2))
    found = compared(models, tmp_path / "out", models / f"{name}0", checkpoint, models / f"{name}1")
    assert [pair["label"] for pair in found["pairs"]] == ["m0 to m1", "m1 to m2", "m0 to m2"]
    same, other, _ = (pair["sets"][0] for pair in found["pairs"])
    assert len(same["points"]) == 5 == found["models"][0]["points"]
    assert all(point["cka"] == point["mean"] == point["low"] == 1.0 and point["std"] == 0.0 for point in same["points"])
    assert all(point["shuffled"] < point["mean"] < 0.99 for point in other["points"]), "another model is another one"
    assert all(point["low"] < point["mean"] < point["high"] for point in other["points"])
    means = [point["mean"] for point in other["points"]]
    assert other["min"]["mean"] == min(means) and other["min"]["point"] == means.index(min(means))
    assert other["min"]["mean_of_draw_minima"] <= min(means)


def test_a_rotated_model_is_1_everywhere_and_its_weights_are_not(models, tmp_path):
    """Every way into and out of the residual stream is turned by one rotation: another basis, the same model (norms without weights of their own)."""
    turn = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))[0]

    def plain(tensors):
        for name in tensors:
            if name.endswith("norm.weight"):
                tensors[name].fill_(1.0)

    def rotate(tensors):
        for name, tensor in tensors.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                tensors[name] = (turn.T @ tensor.double()).float()
            elif tensor.dim() == 2 and not name.startswith("lm_head"):
                tensors[name] = (tensor.double() @ turn).float()

    start = changed(models / "llama0", tmp_path / "start", plain)
    turned = changed(start, tmp_path / "turned", rotate)
    assert not torch.allclose(load_file(start / WEIGHTS)["model.embed_tokens.weight"], load_file(turned / WEIGHTS)["model.embed_tokens.weight"])
    points = compared(models, tmp_path / "out", start, turned)["pairs"][0]["sets"][0]["points"]
    assert [point["mean"] for point in points] == pytest.approx([1.0] * 5, abs=1e-6)


def test_both_backends_give_the_same_figures(models, tmp_path, monkeypatch):
    opened: list[Path] = []
    real = cka_run.open_transformers
    monkeypatch.setattr(cka_run, "open_transformers", lambda folder, *rest: opened.append(folder) or real(folder, *rest))
    folders = (models / "granite_hybrid0", models / "granite_hybrid1")
    ours = compared(models, tmp_path / "ours", *folders)["pairs"][0]["sets"][0]["points"]
    assert not opened
    theirs = compared(models, tmp_path / "theirs", *folders, backend="transformers")["pairs"][0]["sets"][0]["points"]
    assert opened == list(folders)
    for key in ("cka", "mean", "low", "high", "shuffled"):
        assert [point[key] for point in ours] == pytest.approx([point[key] for point in theirs], rel=1e-4)


def test_one_layer_that_changed_shows_from_there_on(models, tmp_path):
    name = "model.layers.2.mlp.down_proj.weight"
    other = changed(models / "llama0", tmp_path / "other", lambda tensors: tensors.update({name: 3 * torch.randn_like(tensors[name])}))
    points = compared(models, tmp_path / "out", models / "llama0", other)["pairs"][0]["sets"][0]["points"]
    assert [point["mean"] == 1.0 for point in points] == [True, True, True, False, False]


def test_a_run_that_was_stopped_goes_on_with_what_it_has(models, tmp_path, monkeypatch):
    cfg = config(models, tmp_path / "out", models / "llama0", models / "llama1")
    opened: list[int] = []
    real = cka_run.Work._open

    def opening(self: Any, number: int) -> Any:
        opened.append(number)
        if number == 1 and len(opened) == 2:
            raise InterruptedError
        return real(self, number)

    monkeypatch.setattr(cka_run.Work, "_open", opening)
    with pytest.raises(InterruptedError):
        cka.run(cfg)
    assert not artifact.is_complete(cfg.output)
    cka.run(cfg)
    assert opened == [0, 1, 1], "the first model is not computed again"
    assert len(list((cfg.output / "states").glob("*.npy"))) == 2
    before = (cfg.output / artifact.COMPLETE).stat().st_mtime_ns
    assert (cka.run(cfg) / artifact.COMPLETE).stat().st_mtime_ns == before and len(opened) == 3


@pytest.mark.parametrize("values", [{"max_tokens": 8}, {"precision": "bf16"}, {"backend": "transformers"}, {"models": 1}], ids=str)
def test_states_of_another_request_count_for_nothing(models, tmp_path, monkeypatch, values):
    """They were left by a run that was stopped: other tokens, another way to compute them, another folder of the same name and fingerprint."""
    first = "model.embed_tokens.weight"  # the fingerprint is of the end of the file
    other = changed(models / "llama0", tmp_path / "other", lambda tensors: tensors[first].mul_(torch.linspace(0.1, 3, 64)))
    assert fingerprint(other) == fingerprint(models / "llama0")
    if "models" in values:
        values = {"models": [{"name": f"m{place}", "path": str(folder)} for place, folder in enumerate((other, models / "llama1"))]}
    with monkeypatch.context() as patched:
        patched.setattr(cka, "_finish", lambda cfg, work: None)
        cka.run(config(models, tmp_path / "out", models / "llama0", models / "llama1"))
    assert len(list((tmp_path / "out/states").glob("*.npy"))) == 2
    expected = compared(models, tmp_path / "new", models / "llama0", models / "llama1", **values)
    assert compared(models, tmp_path / "out", models / "llama0", models / "llama1", **values) == expected
    assert len(list((tmp_path / "out/states").glob("*.npy"))) == 2, "what the other request left is gone"
    if values == {"max_tokens": 8}:
        (read,) = expected["sets"]
        assert read["longest"] == 8 and read["cut"] > 0 and read["tokens"] <= 8 * INPUTS


def test_a_folder_whose_weights_are_others_is_looked_into_again(models, tmp_path):
    shutil.copytree(models / "llama0", tmp_path / "model")
    arguments = (models, tmp_path / "out", models / "llama0", tmp_path / "model")
    assert compared(*arguments, keep_states=False)["pairs"][0]["sets"][0]["min"]["mean"] == 1.0
    assert not list((tmp_path / "out/states").glob("*.npy"))
    shutil.copyfile(models / "llama1" / WEIGHTS, tmp_path / "model" / WEIGHTS)
    assert compared(*arguments, keep_states=False)["pairs"][0]["sets"][0]["min"]["mean"] < 0.99


def test_the_table_and_the_page_say_what_the_json_says(models, tmp_path):
    sets = [
        {"name": "wikitext", "files": [str(models / "text.txt")], "min_characters": 5},
        {"name": "gsm8k", "files": [str(models / "*.jsonl")], "column": "question"},
    ]
    pairs = [{"start": "m1", "end": "m0", "paper": "granite-3.3-8b"}]
    found = compared(models, tmp_path / "out", models / "llama0", models / "llama1", sets=sets, pairs=pairs)
    (pair,) = found["pairs"]
    assert pair["paper"]["min"] == {"wikitext": 0.9999, "gsm8k": 0.9997}
    with (tmp_path / "out/cka.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["mean"]) for row in rows if row["set"] == "wikitext"] == [point["mean"] for point in pair["sets"][0]["points"]]
    page = (tmp_path / "out/cka.html").read_text()
    assert page.count("<svg") == 2 and ">0.9997<" in page and "after the final norm" in page and "Equation 4 does not centre" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", ""), "nothing is fetched"
    uncentred = compared(models, tmp_path / "un", models / "llama0", models / "llama1", centred=False)
    assert uncentred["pairs"][0]["sets"][0]["points"][0]["cka"] != pair["sets"][0]["points"][0]["cka"]
    assert "not centred" in (tmp_path / "un/cka.html").read_text()


def test_a_layer_at_which_all_inputs_are_alike_is_named_and_has_no_figure(models, tmp_path):
    def same_embedding(tensors):
        tensors["model.embed_tokens.weight"][:] = tensors["model.embed_tokens.weight"][5]

    flat = changed(models / "llama0", tmp_path / "flat", same_embedding)
    found = compared(models, tmp_path / "out", flat, models / "llama1")["pairs"][0]["sets"][0]
    assert found["points"][0]["cka"] is None and "one and the same state" in found["points"][0]["degenerate"]
    assert "no figure at embeddings" in (tmp_path / "out/cka.html").read_text()


def refusal(*arguments: Any, **values: Any) -> str:
    with pytest.raises(UserError) as refused:
        cka.run(config(*arguments, **values))
    return str(refused.value)


def test_what_cannot_be_compared_is_refused(models, tmp_path):
    first, second, out = models / "llama0", models / "llama1", tmp_path / "out"
    message = refusal(models, out, first, second, inputs=60)
    assert f"holds {2 * INPUTS} different texts" in message and f"set inputs={2 * INPUTS} and bootstrap.size={INPUTS}" in message
    assert f"output={first / 'cka'} lies in {first}, which is read" in refusal(models, first / "cka", first, second)
    assert f"output={models} holds {first}, which is read" in refusal(models, models, first, second)
    fewer = write_tiny("llama", tmp_path / "fewer", num_hidden_layers=3)
    assert "m0 and m1 have 4 and 3 layers" in refusal(models, out, first, fewer)
    relabelled = changed(first, tmp_path / "relabelled", lambda tensors: None)
    text = (relabelled / "tokenizer.json").read_text()
    (relabelled / "tokenizer.json").write_text(text.replace('"w5"', '"other"'))
    assert "different tokenizers" in refusal(models, out, first, relabelled) and "own_tokenizers=true" in refusal(models, out, first, relabelled)
    assert "would be cut at other places" in refusal(models, out, first, relabelled, own_tokenizers=True, max_tokens=8)
    assert "max_tokens=500 is more than model m0 has positions (256); try max_tokens=256" in refusal(models, out, first, second, max_tokens=500)
    questions = [{"name": "q", "files": [str(models / "questions.jsonl")]}]
    assert "no column 'text'" in refusal(models, out, first, second, sets=questions) and "set column" in refusal(
        models, out, first, second, sets=questions
    )
    assert "made to fill a model's context" in refusal(models, out, first, second, sets=[{"name": "r", "tasks": ["niah_single_1"]}])
    layer = changed(first, tmp_path / "layer", lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("model.layers.3.")])
    assert "lacks model.layers.3." in refusal(models, out, first, layer)
    shutil.rmtree(out)
    paper = [{"start": "m0", "end": "m1", "paper": "granite-3.3-8b"}]
    assert "of sets wikitext, c4, gsm8k, and sets are text" in refusal(models, out, first, second, pairs=paper)
    assert "must divide the 1 ranks of this launch; start 2 ranks" in refusal(models, out, first, second, parallel={"tp": 2})
    assert not out.exists()


def test_other_tokenizers_widths_and_families_can_be_compared_where_asked_for(models, tmp_path):
    wide = write_tiny("granite_hybrid", tmp_path / "wide", hidden_size=32, mamba_n_heads=4)
    text = (wide / "tokenizer.json").read_text()
    (wide / "tokenizer.json").write_text(text.replace('"w5"', '"other"'))
    found = compared(models, tmp_path / "out", models / "llama0", wide, own_tokenizers=True)["pairs"][0]["sets"][0]["points"]
    assert all(0 < point["cka"] < 1 for point in found)


def test_states_that_are_no_numbers_are_refused_by_layer_and_weight(models, tmp_path):
    name = "model.layers.1.self_attn.v_proj.weight"
    broken = changed(models / "llama0", tmp_path / "broken", lambda tensors: tensors[name][3].fill_(math.nan))
    message = refusal(models, tmp_path / "out", models / "llama0", broken)
    assert f"model m1 ({broken}), set text" in message and f"{INPUTS} of {INPUTS} inputs" in message and "from layer 2 on" in message
    assert f"its weight {name} holds NaN" in message and "take an earlier checkpoint" in message
    assert not artifact.is_complete(tmp_path / "out")
    huge = changed(models / "llama0", tmp_path / "huge", lambda tensors: tensors["model.embed_tokens.weight"].mul_(4e38).clamp_(-3e38, 3e38))
    assert "its weights are all finite" in refusal(models, tmp_path / "huge out", models / "llama0", huge)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bootstrap": {"size": 24}}, "bootstrap.size=24 must be less than inputs=24"),
        ({"models": [{"name": "a", "path": "x"}]}, "at least 2"),
        ({"sets": [{"name": "a", "builtin": "prose"}, {"name": "a", "builtin": "tasks"}]}, "sets.name=a is given twice"),
        ({"sets": [{"name": "a", "builtin": "prose", "files": ["x"]}]}, "give one of them"),
        ({"sets": [{"name": "a"}]}, "none of files, tasks and builtin"),
        ({"pairs": [{"start": "m0", "end": "m7"}]}, "m7 is no model; models are m0, m1"),
        ({"pairs": [{"start": "m0", "end": "m0"}]}, "m0 with itself is 1"),
        ({"parallel": {"cp": 2}}, "parallel.cp=2: hidden states are read under tp, pp and sp"),
        ({"backend": "transformers", "parallel": {"tp": 2}}, "backend=transformers computes in one process"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        config(tmp_path, tmp_path / "out", Path("x"), Path("y"), **values)


def test_what_is_not_said_is_the_papers_way_but_for_the_centring_that_it_does_not_print():
    listed = [{"name": name, "path": name} for name in ("a", "b")]
    cfg = validate({"output": "o", "models": listed, "sets": [{"name": "prose", "builtin": "prose"}]}, cka.Config, "test")
    assert (cfg.inputs, cfg.bootstrap.draws, cfg.bootstrap.size, cfg.centred) == (200, 20, 100, True)


def test_built_in_sets_need_neither_files_nor_network(models, tmp_path):
    from megatron_prism.analysis.cka_inputs import read_sets

    sets = [{"name": "prose", "builtin": "prose"}, {"name": "tasks", "builtin": "tasks"}, {"name": "gcd", "tasks": ["gcd"]}]
    cfg = config(models, tmp_path / "out", models / "llama0", models / "llama1", sets=sets, inputs=80, bootstrap={"size": 40})
    prose, tasks, gcd = read_sets(cfg)
    assert prose.found > 500 and tasks.found > 500 and gcd.found == 80
    assert len(set(prose.texts)) == len(set(tasks.texts)) == 80 and all(len(text) >= 200 for text in prose.texts)
    assert read_sets(cfg)[1] == tasks, "the same draw each time"
    assert read_sets(cfg.model_copy(update={"seed": 5}))[0].texts != prose.texts


def test_the_examples_recipe_is_one():
    recipe = Path(__file__).resolve().parents[2] / "examples/tiny/cka.toml"
    cfg = load_recipe(recipe, [], cka.Config)
    assert [entry.builtin for entry in cfg.sets] == ["prose", "tasks"] and cfg.bootstrap.size < cfg.inputs


def test_the_command_says_what_it_would_do_and_does_it(models, tmp_path):
    cfg = config(models, tmp_path / "out", models / "llama0", models / "llama1")
    recipe = tmp_path / "cka.toml"
    recipe.write_text(artifact.to_toml(cfg))
    assert load_recipe(recipe, [], cka.Config) == cfg
    plan = prism("cka", recipe, "--dry-run")
    assert plan.returncode == 0 and f"set text: {INPUTS} of {2 * INPUTS} texts" in plan.stdout and not (tmp_path / "out").exists()
    done = prism("cka", recipe)
    assert done.returncode == 0, done.stderr
    assert "CKA, m0 to m1" in done.stdout and "cka.html" in done.stdout
