"""The evaluation stage, end to end on tiny real models: a folder of scores, side by side, from every kind of model path."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import alive, stand_in
from tiny_hf import make_tiny_model
from tiny_shards import DOCUMENTS

from megatron_prism import artifact
from megatron_prism.config import load_recipe, validate
from megatron_prism.errors import UserError
from megatron_prism.evals import perplexity
from megatron_prism.evals.frames import records
from megatron_prism.evals.models import find_model, fingerprint
from megatron_prism.generate.vllm_server import PYTHON
from megatron_prism.stages import evaluate, prep


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny models `one` and `two` with one tokenizer, a prep output `data` and a task file `sums.toml`."""
    folder = tmp_path_factory.mktemp("evaluate")
    for seed, name in enumerate(("one", "two")):
        make_tiny_model(folder / name, seed=seed)
    for domain in ("prose", "code"):
        lines = [json.dumps({"text": f"{domain} {number}: {text}"}) for number in range(8) for text in DOCUMENTS]
        (folder / f"{domain}.jsonl").write_text("\n".join(lines) + "\n")
    sources = [{"name": name, "domain": name, "weight": 1.0, "paths": [str(folder / f"{name}.jsonl")]} for name in ("prose", "code")]
    recipe = {"output": str(folder / "data"), "tokenizer": str(folder / "one"), "source": sources, "validation_fraction": 0.3, "workers": 1}
    prep.run(validate(recipe, prep.Config, where="test"))
    (folder / "sums.toml").write_text('name = "sums"\ndomain = "math"\ndataset = "chain_sum"\nnum_questions = 6\nmax_new_tokens = 8\n')
    return folder


def _recipe(place: Path, output: str, **changes: object) -> dict[str, object]:
    models = [{"name": name, "path": str(place / name)} for name in ("one", "two")]
    blocks = {
        "perplexity": {"blend": str(place / "data"), "seq_len": 16, "batch_size": 4},
        "tasks": {"names": [str(place / "sums.toml")], "grading_workers": 0},
    }
    return {"output": str(place / output), "models": models, **blocks, **changes}


def _run(place: Path, output: str, **changes: object) -> dict[str, Any]:
    folder = evaluate.run(validate(_recipe(place, output, **changes), evaluate.Config, where="test"))
    artifact.require(folder, "evaluate")
    return json.loads((folder / "scores.json").read_text())["models"]


def _timeless(figures: dict[str, Any]) -> dict[str, Any]:
    """A task's figures but for its durations and its samples' names."""
    return {key: value for key, value in figures.items() if not key.endswith("seconds") and isinstance(value, float | int)}


def test_scores_of_two_models_side_by_side(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = _run(place, "scores")
    assert list(scores) == ["one", "two"]
    for figures in scores.values():
        assert list(figures["perplexity"]["domains"]) == ["prose", "code"]
        for domain in figures["perplexity"]["domains"].values():
            assert domain["perplexity"] == pytest.approx(math.exp(domain["nll"] / domain["tokens"]))
            assert domain["bits_per_byte"] == pytest.approx(domain["nll"] / math.log(2) / domain["bytes"])
        assert figures["tasks"]["sums"]["num_questions"] == 6
    assert scores["one"]["perplexity"] != scores["two"]["perplexity"]
    printed = capsys.readouterr().out
    assert "one" in printed
    assert "sums: accuracy" in printed
    assert "±" in printed
    table = (place / "scores" / "table.md").read_text()
    assert table.startswith("|  | one | two |\n| --- | ---: | ---: |\n| prose: perplexity |")
    found = list(records(place / "scores" / "responses" / "two" / "sums.jsonl.zst"))
    assert len(found) == 6
    assert {"id", "question", "text", "reason", "finish_reason"} <= found[0].keys()
    assert not (place / "scores" / "parts").exists()


def test_scores_do_not_depend_on_who_stands_beside_or_on_batches(place: Path) -> None:
    both = _run(place, "both")
    models = [{"name": "two", "path": str(place / "two")}]
    alone = _run(place, "alone", models=models, generation={"batch_size": 1})
    assert _timeless(both["two"]["tasks"]["sums"]) == pytest.approx(_timeless(alone["two"]["tasks"]["sums"]))
    assert both["two"]["perplexity"] == alone["two"]["perplexity"]


def test_a_finished_evaluation_is_not_run_again(place: Path) -> None:
    _run(place, "again")
    before = (place / "again" / "scores.json").stat().st_mtime_ns
    _run(place, "again")
    assert (place / "again" / "scores.json").stat().st_mtime_ns == before


def test_a_checkpoint_scores_as_the_model_it_was_made_from(place: Path) -> None:
    from megatron_prism.stages import convert

    recipe = {"direction": "import", "source": str(place / "one"), "output": str(place / "checkpoint")}
    convert.run(validate(recipe, convert.Config, where="test"))
    models = [{"name": "hf", "path": str(place / "one")}, {"name": "checkpoint", "path": str(place / "checkpoint")}]
    scores = _run(place, "of_checkpoint", models=models)
    assert scores["hf"]["perplexity"] == scores["checkpoint"]["perplexity"]
    assert _timeless(scores["hf"]["tasks"]["sums"]) == _timeless(scores["checkpoint"]["tasks"]["sums"])


def test_sampled_evaluation_counts_every_completion(place: Path) -> None:
    scores = _run(place, "sampled", perplexity=None, generation={"temperature": 1.0, "n": 3, "max_new_tokens": 5})
    assert scores["one"]["tasks"]["sums"]["completions_per_question"] == 3
    assert len(list(records(place / "sampled" / "responses" / "one" / "sums.jsonl.zst"))) == 18
    assert set(scores["one"]["tasks"]["sums"]["pass_at"]) == {"1", "2", "3"}


def test_held_out_text_that_changed_meanwhile_is_measured_again(place: Path, tmp_path: Path) -> None:
    data = shutil.copytree(place / "data", tmp_path / "data")
    changes = {"models": [{"name": "one", "path": str(place / "one")}], "tasks": None}
    blend = {"seq_len": 16, "batch_size": 4, "blend": str(data)}
    before = _run(place, "changing", **changes, perplexity=blend)
    shutil.rmtree(data)
    for file in ("prose", "code"):
        text = (place / f"{file}.jsonl").read_text()
        (tmp_path / f"{file}.jsonl").write_text(text.replace("a", "e"))
    sources = [{"name": name, "domain": name, "weight": 1.0, "paths": [str(tmp_path / f"{name}.jsonl")]} for name in ("prose", "code")]
    recipe = {"output": str(data), "tokenizer": str(place / "one"), "source": sources, "validation_fraction": 0.3, "workers": 1}
    prep.run(validate(recipe, prep.Config, where="test"))
    (place / "changing" / "COMPLETE").unlink()
    after = _run(place, "changing", **changes, perplexity=blend)
    fresh = _run(place, "fresh", **changes, perplexity=blend)
    assert after["one"]["perplexity"] == fresh["one"]["perplexity"] != before["one"]["perplexity"]


def test_vllm_servers_are_gone_before_perplexity_takes_their_memory(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PYTHON, str(stand_in(tmp_path)))
    monkeypatch.setenv("FAKE_PIDS", str(tmp_path / "pids"))
    measured = []

    def measure(*arguments: Any) -> perplexity.Likelihood:
        measured.append(alive(tmp_path / "pids"))
        return original(*arguments)

    original = perplexity.measure
    monkeypatch.setattr(perplexity, "measure", measure)
    scores = _run(place, "servers", models=[{"name": "one", "path": str(place / "one")}], generation={"backend": "vllm"})
    assert scores["one"]["tasks"]["sums"]["num_questions"] == 6
    assert (tmp_path / "pids").read_text() and measured == [[], []]
    assert scores["one"]["perplexity"] == _run(place, "scores")["one"]["perplexity"]


def test_another_tokenizer_is_refused(place: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", vocab_size=310)
    recipe = _recipe(place, "refused", models=[{"name": "other", "path": str(other)}], tasks=None)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[20:22]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="prepare the held-out text with its tokenizer"):
        evaluate.run(validate(recipe, evaluate.Config, where="test"))
    assert not artifact.is_complete(place / "refused")


def test_model_paths_are_told_apart(place: Path, tmp_path: Path) -> None:
    assert find_model(place / "one") == place / "one"
    run = tmp_path / "run"
    (run / "checkpoints" / "step_00000010").mkdir(parents=True)
    with pytest.raises(UserError, match="no COMPLETE mark"):
        find_model(run)
    with pytest.raises(UserError, match="is no folder"):
        find_model(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no model"):
        find_model(tmp_path.parent / tmp_path.name / "run" / "checkpoints" / "step_00000010")


def test_a_model_is_another_one_with_another_tokenizer_chat_template_or_weights(place: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(place / "one", tmp_path / "one")
    seen = {fingerprint(folder)}
    assert seen == {fingerprint(place / "one")}
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    seen.add(fingerprint(folder))
    (folder / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    seen.add(fingerprint(folder))
    (folder / "tokenizer_config.json").write_text("{}")
    seen.add(fingerprint(folder))
    shutil.copy(place / "two" / "model.safetensors", folder)
    assert len(seen | {fingerprint(folder)}) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"perplexity": None, "tasks": None}, "nothing to evaluate"),
        ({"models": []}, "models"),
        ({"models": [{"name": "a", "path": "x"}, {"name": "a", "path": "y"}]}, "names of their own"),
        ({"models": [{"name": "series.json", "path": "x"}]}, "cannot be called 'series.json'"),
        ({"models": [{"name": "step_4", "path": "x"}], "follow": {"run": "y"}}, "choose other names than step_4"),
        ({"generation": {"top_p": 0}}, "top_p"),
        ({"colour": 1}, "unknown key colour"),
    ],
)
def test_bad_recipes_are_refused_before_anything_is_loaded(place: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(_recipe(place, "bad", **changes), evaluate.Config, where="test")


def test_sampling_that_makes_no_sense_is_refused_before_anything_is_loaded(place: Path) -> None:
    with pytest.raises(UserError, match="would all be equal"):
        _run(place, "bad", generation={"n": 4})
    assert not (place / "bad").exists()


def test_the_dry_run_says_what_would_be_scored(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.dry_run(validate(_recipe(place, "dry"), evaluate.Config, where="test"))
    printed = capsys.readouterr().out
    assert "perplexity on prose (prose):" in printed
    assert "task sums: 6 questions, 1 completions each" in printed
    assert not (place / "dry").exists()


def test_the_example_asks_the_offline_suite() -> None:
    recipe = Path(__file__).resolve().parents[2] / "examples" / "smollm2_135m" / "offline.toml"
    cfg = load_recipe(recipe, [], evaluate.Config)
    assert len(evaluate.tasks_of(cfg)) == 12
    assert (cfg.generation.n, cfg.generation.device) == (2, "cpu")


@pytest.mark.parametrize(("ranks", "parallel"), [("ranks = 2\n", True), ("", False)])
def test_a_pipeline_evaluates_in_one_process_or_on_ranks(place: Path, tmp_path: Path, ranks: str, parallel: bool) -> None:
    from megatron_prism.launch.plan import load_plan

    table = json.dumps(str(place / "one"))
    text = f'output = "runs"\n[[stage]]\nname = "evaluate"\n{ranks}set = {{ models = [{{ name = "one", path = {table} }}], tasks.names = ["gcd"] }}\n'
    (tmp_path / "pipeline.toml").write_text(text)
    (step,) = load_plan(tmp_path / "pipeline.toml")
    assert step.parallel == parallel


def test_importing_the_stage_does_not_import_torch() -> None:
    script = "import sys, megatron_prism.stages.evaluate; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
