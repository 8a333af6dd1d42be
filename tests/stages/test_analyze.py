"""`prism analyze`: planted changes are found exactly, whatever form the models have; what cannot be compared is refused before any work."""

import csv
import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from prism_command import prism
from safetensors.torch import load_file, save_file
from tiny_models import edit_config, imported, write_pairs, write_tiny

from megatron_prism import artifact
from megatron_prism.analysis import stream
from megatron_prism.analysis.journal import Journal
from megatron_prism.config import load_recipe, validate
from megatron_prism.errors import UserError
from megatron_prism.stages import analyze
from megatron_prism.stages.analyze import with_models

WEIGHTS = "model.safetensors"
CHANGED = "model.layers.2.self_attn.v_proj.weight"


def config(output: Path, *models: Path, **values: Any) -> analyze.Config:
    listed = [{"name": f"m{place}", "path": str(folder)} for place, folder in enumerate(models)]
    return validate({"models": listed, "output": str(output), **values}, analyze.Config, "test")


def analyzed(output: Path, *models: Path, **values: Any) -> dict[str, Any]:
    return json.loads((analyze.run(config(output, *models, **values)) / "analysis.json").read_text())


def changed(source: Path, output: Path, change: Any) -> Path:
    """A copy of a folder whose tensors went through `change(tensors)`."""
    shutil.copytree(source, output)
    tensors = load_file(output / WEIGHTS)
    change(tensors)
    save_file(tensors, output / WEIGHTS, metadata={"format": "pt"})
    return output


def groups(pair: dict[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in pair["groups"] if row["kind"] == kind and row["layer"] is None}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Two models each of a dense and a hybrid family."""
    return write_pairs(tmp_path_factory.mktemp("models"))


def test_a_model_against_itself_has_not_changed(models, tmp_path):
    shutil.copytree(models / "llama0", tmp_path / "copy")
    pair = analyzed(tmp_path / "out", models / "llama0", tmp_path / "copy")["pairs"][0]
    for row in pair["groups"]:
        assert row["ratio_of_norms"] == row["mean_of_matrices"] == 0.0 and row["identical"] == {"fp32": 1.0, "bf16": 1.0}
        assert set(row["unchanged"]["fp32"].values()) == set(row["unchanged"]["bf16"].values()) == {1.0}
        assert row["mean_stable_rank"] is None


def test_a_planted_update_is_found_in_its_matrix_at_its_threshold_and_with_its_rank(models, tmp_path):
    """One matrix gets a change of rank 1 that moves its first 5 rows by 3 %; all others stay bit for bit."""

    def grow(tensors):
        tensors[CHANGED][:5] = tensors[CHANGED][0] * torch.tensor([[1.0], [2.0], [-1.0], [0.5], [4.0]])

    before = changed(models / "llama0", tmp_path / "before", grow)
    after = changed(before, tmp_path / "after", lambda tensors: tensors[CHANGED][:5].mul_(1.03))
    pair = analyzed(tmp_path / "out", before, after)["pairs"][0]
    rows = {row["matrix"]: row for row in pair["matrices"]}
    weight = load_file(before / WEIGHTS)[CHANGED].double()
    share = 1 - 5 / weight.shape[0]
    found = rows.pop(CHANGED)
    assert (found["layer"], found["component"], found["part"]) == (2, "attention", "v")
    assert found["unchanged"]["fp32"] == {"0.1": share, "0.5": share, "1": share, "2": share, "5": 1.0, "10": 1.0}
    assert found["normalised_l2"] == pytest.approx(0.03 * float(weight[:5].norm() / weight.norm()), rel=1e-4)
    assert found["stable_rank"] == pytest.approx(1.0, abs=1e-5)
    assert all(row["normalised_l2"] == 0.0 and row["identical"]["fp32"] == 1.0 for row in rows.values())
    total = groups(pair, "total")["total"]
    elements = sum(math.prod(row["shape"]) for row in [found, *rows.values()])
    assert total["elements"] == elements and total["identical"]["fp32"] == 1 - 5 * weight.shape[1] / elements


@pytest.mark.parametrize("name", ["llama", "granite_hybrid"])
def test_folders_and_checkpoints_of_any_layout_and_any_workers_give_the_same_figures(models, tmp_path, name):
    first, second = models / f"{name}0", models / f"{name}1"
    folders = analyzed(tmp_path / "folders", first, second)
    one = imported(first, tmp_path / "one", tp=2, pp=2)
    other = imported(second, tmp_path / "other", tp=4)
    checkpoints = analyzed(tmp_path / "checkpoints", one, other, workers=2 if name == "granite_hybrid" else 1)
    assert checkpoints["pairs"] == folders["pairs"]
    slices = [f"in_proj.{part}" for part in ("z", "x", "B", "C", "dt")] + [f"conv1d.{part}" for part in "xBC"]
    assert list(groups(folders["pairs"][0], "slice")) == (slices if name == "granite_hybrid" else [])
    assert ("mamba" in groups(folders["pairs"][0], "component")) == (name == "granite_hybrid")


def test_three_models_are_compared_in_order_and_their_updates_by_angle(models, tmp_path):
    """The third goes on from the second in the direction of the first update, twice as far: both updates point one way."""
    start, middle = (load_file(models / f"llama{seed}" / WEIGHTS) for seed in (0, 1))
    end = changed(models / "llama0", tmp_path / "end", lambda tensors: [tensors[name].add_(middle[name] - start[name], alpha=3) for name in tensors])
    found = analyzed(tmp_path / "out", models / "llama0", models / "llama1", end)
    assert [pair["label"] for pair in found["pairs"]] == ["m0 to m1", "m1 to m2", "m0 to m2"]
    l2 = {pair["label"]: groups(pair, "total")["total"]["ratio_of_norms"] for pair in found["pairs"]}
    assert l2["m0 to m2"] == pytest.approx(3 * l2["m0 to m1"], rel=1e-5)
    (angle,) = found["cosines"]
    assert (angle["one"], angle["other"]) == ("m0 to m1", "m0 to m2")
    assert all(row["cosine"] == pytest.approx(1.0, abs=1e-5) for row in angle["groups"])
    without = analyzed(tmp_path / "without", models / "llama0", models / "llama1", end, cosines=False, rank=None)
    assert not without["cosines"] and all(row["stable_rank"] is None for pair in without["pairs"] for row in pair["matrices"])


def test_the_tables_on_disk_and_the_page_say_what_the_json_says(models, tmp_path):
    pairs = [{"start": "m0", "end": "m1", "paper": "granite-3.3-8b/mcs/base-mt"}]
    found = analyzed(tmp_path / "out", models / "llama0", models / "llama1", pairs=pairs, rank="effective")
    with (tmp_path / "out/matrices.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = found["pairs"][0]["matrices"]
    assert [row["matrix"] for row in rows] == [row["matrix"] for row in expected]
    assert [float(row["normalised_l2"]) for row in rows] == [row["normalised_l2"] for row in expected]
    assert all(float(row["effective_rank"]) > float(row["stable_rank"]) > 1 for row in rows if row["part"] == "q")
    with (tmp_path / "out/groups.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(found["pairs"][0]["groups"])
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("<svg") == 4 and "Table 22" in page and ">0.329<" in page, "the paper's MLP stands beside ours"
    assert "http" not in page.replace("http://www.w3.org/2000/svg", ""), "nothing is fetched"
    read = artifact.require(tmp_path / "out", "analyze")["bytes_read"]
    assert read == 2 * sum(tensor.nbytes for tensor in load_file(models / "llama0" / WEIGHTS).values())


def test_the_page_says_whose_weights_were_rounded_also_of_a_hybrid_with_a_few_in_fp32(models, tmp_path):
    short = write_tiny("granite_hybrid", tmp_path / "short", dtype=torch.bfloat16)
    found = analyzed(tmp_path / "out", models / "granite_hybrid0", short)
    sizes = {str(dtype): sum(x.numel() for x in load_file(short / WEIGHTS).values() if x.dtype == dtype) for dtype in (torch.bfloat16, torch.float32)}
    assert {f"torch.{kind}": count for kind, count in found["models"][1]["read_as"].items()} == sizes and sizes["torch.float32"] > 0
    page = (tmp_path / "out/report.html").read_text()
    assert "m1: most weights are stored in 16 bits; the figures called fp32 are those of rounded weights" in page


def test_an_analysis_that_is_done_is_not_done_again(models, tmp_path):
    cfg = config(tmp_path / "out", models / "llama0", models / "llama1")
    before = (analyze.run(cfg) / artifact.COMPLETE).stat().st_mtime_ns
    assert (analyze.run(cfg) / artifact.COMPLETE).stat().st_mtime_ns == before


def test_a_folder_whose_weights_are_others_is_compared_again(models, tmp_path):
    """A Hugging Face folder has no digest that would tell."""
    shutil.copytree(models / "llama0", tmp_path / "model")
    before = analyzed(tmp_path / "out", models / "llama0", tmp_path / "model")["pairs"][0]
    shutil.copyfile(models / "llama1" / WEIGHTS, tmp_path / "model" / WEIGHTS)
    after = analyzed(tmp_path / "out", models / "llama0", tmp_path / "model")["pairs"][0]
    assert groups(before, "total")["total"]["identical"]["fp32"] == 1.0 > groups(after, "total")["total"]["identical"]["fp32"]


def test_the_course_of_a_run_is_measured_from_its_start(models, tmp_path):
    """A run of three checkpoints that goes straight from one model to another: 0.5, 0.75 and all of the way."""
    start, end = (load_file(models / f"llama{seed}" / WEIGHTS) for seed in (0, 1))
    run = tmp_path / "run"
    for step, share in ((10, 0.5), (20, 0.75), (30, 1.0)):
        moved = changed(models / "llama0", tmp_path / f"at{step}", lambda tensors, share=share: [tensors[n].lerp_(end[n], share) for n in start])
        imported(moved, run / "checkpoints" / f"step_{step:08d}")
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": step, "lr": 1e-3}) + "\n" for step in range(1, 31)))
    series = analyzed(tmp_path / "out", models / "llama0", series={"run": str(run)})["series"]
    assert [row["step"] for row in series["steps"]] == [10, 20, 30]
    for part in ("total", "attention", "mlp", "norms"):
        assert [row["share_of_change"][part] for row in series["steps"]] == pytest.approx([0.5, 0.75, 1.0], rel=1e-5)
    assert [row["share_of_lr"] for row in series["steps"]] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert "constant" in series["note"] and series["start"] == "m0"
    with_run = analyze.check(config(tmp_path / "with run", models / "llama0", run, series={"run": str(run)}))
    assert [pair.label for pair in with_run.pairs if pair.step] == [f"m0 to step {step}" for step in (10, 20, 30)], "not from the run itself"
    own = refusal(tmp_path / "own", run, run / "checkpoints/step_00000010", series={"run": str(run)})
    assert f"series.run={run} is the run of every one of models; give series.start" in own
    every = analyzed(tmp_path / "every", models / "llama0", series={"run": str(run), "every": 2})["series"]
    assert [row["step"] for row in every["steps"]] == [20, 30]


def refusal(output: Path, *models: Path, **values: Any) -> str:
    with pytest.raises(UserError) as refused:
        analyze.run(config(output, *models, **values))
    assert not (output / artifact.COMPLETE).exists()
    return str(refused.value)


def test_what_cannot_be_compared_is_refused_before_any_work(models, tmp_path):
    first, out = models / "llama0", tmp_path / "out"
    other_shape = write_tiny("llama", tmp_path / "wide", intermediate_size=128)
    assert "ffn_hidden_size is 96 and 128; give models of one shape" in refusal(out, first, other_shape)
    assert "the family is llama and granitemoehybrid" in refusal(out, first, models / "granite_hybrid0")
    fewer = write_tiny("llama", tmp_path / "fewer", num_hidden_layers=3)
    assert "num_layers is 4 and 3" in refusal(out, first, fewer)
    relabelled = changed(first, tmp_path / "relabelled", lambda tensors: None)
    text = (relabelled / "tokenizer.json").read_text()
    (relabelled / "tokenizer.json").write_text(text.replace('"w5"', '"other"'))
    assert "different tokenizers" in refusal(out, first, relabelled) and "stand for different tokens" in refusal(out, first, relabelled)
    lacking = changed(first, tmp_path / "lacking", lambda tensors: tensors.pop(CHANGED))
    assert f"lacks {CHANGED}" in refusal(out, first, lacking)
    layer = changed(first, tmp_path / "layer", lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("model.layers.3.")])
    assert "lacks model.layers.3." in refusal(out, first, layer)
    assert "is no folder" in refusal(out, first, tmp_path / "nowhere")
    assert "holds no complete checkpoint" in refusal(out, first, series={"run": str(first)})
    assert "is no row of the paper's T12; rows are granite-3.3-8b/mcs/base-mt" in refusal(
        out, first, models / "llama1", pairs=[{"start": "m0", "end": "m1", "paper": "granite"}]
    )
    assert "holds" in refusal(models, first, models / "llama1")
    assert f"lies in {first}, which is read" in refusal(first / "changes", first, models / "llama1")
    assert not out.exists()


def test_a_longer_context_is_no_difference_of_shape(models, tmp_path):
    extended = changed(models / "llama0", tmp_path / "extended", lambda tensors: None)
    edit_config(extended, max_position_embeddings=1024, rope_theta=1e6)
    assert groups(analyzed(tmp_path / "out", models / "llama0", extended)["pairs"][0], "total")["total"]["ratio_of_norms"] == 0.0


def test_weights_that_are_no_numbers_are_refused_by_model_and_tensor(models, tmp_path):
    def spoil(tensors):
        tensors[CHANGED][3, 4] = math.nan
        tensors[CHANGED][5, 6] = math.inf

    broken = changed(models / "llama0", tmp_path / "broken", spoil)
    message = refusal(tmp_path / "out", models / "llama0", broken)
    assert f"model m1 ({broken}): {CHANGED} holds 2 values that are NaN or infinite" in message and "take an earlier checkpoint" in message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"models": [{"name": "a", "path": "x"}]}, "one model has changed against nothing"),
        ({"models": [{"name": "a", "path": "x"}, {"name": "a", "path": "y"}]}, "a is given twice"),
        ({"pairs": [{"start": "m0", "end": "m9"}]}, "m9 is no model; models are m0, m1"),
        ({"pairs": [{"start": "m0", "end": "m0"}]}, "is no update"),
        ({"series": {"run": "r", "start": "m9"}}, "m9 is no model"),
        ({"rank": "full"}, "stable"),
        ({"workers": 0}, "greater than 0"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(values, message):
    content = {"models": [{"name": f"m{place}", "path": f"x{place}"} for place in range(2)], "output": "out", **values}
    with pytest.raises(UserError, match=message):
        validate(content, analyze.Config, "test")


def test_names_are_printed_as_they_are(models, tmp_path, capsys):
    """Square brackets and colons are markup to the library that prints."""
    listed = [{"name": f"[bold]m{seed} :smile:", "path": str(models / f"llama{seed}")} for seed in (0, 1)]
    analyze.run(validate({"models": listed, "output": str(tmp_path / "out"), "rank": None}, analyze.Config, "test"))
    assert "[bold]m0 :smile: to [bold]m1 :smile:" in capsys.readouterr().out


def test_an_analysis_that_was_killed_measures_the_others_alone_and_says_the_same(models, tmp_path, monkeypatch):
    """Ended in the middle of a pass, its last line cut short; three models, a hybrid's slices, angles and ranks."""
    third = changed(models / "granite_hybrid0", tmp_path / "third", lambda tensors: [tensor.mul_(1.01) for tensor in tensors.values()])
    folders = (models / "granite_hybrid0", models / "granite_hybrid1", third)
    whole = analyzed(tmp_path / "whole", *folders, rank="effective")
    cfg = config(tmp_path / "out", *folders, rank="effective")
    measured: list[int] = []
    real = stream.Walker.batch

    def batch(self: Any, place: int) -> Any:
        measured.append(place)
        if measured == list(range(21)):
            raise InterruptedError
        return real(self, place)

    monkeypatch.setattr(stream.Walker, "batch", batch)
    with pytest.raises(InterruptedError):
        analyze.run(cfg)
    kept = cfg.output / "measured.jsonl.tmp"
    lines = kept.read_text().splitlines(keepends=True)
    assert len(lines) == 20 and not artifact.is_complete(cfg.output)
    kept.write_text("".join(lines[:-1]) + lines[-1][:-40])
    first, measured[:] = list(measured), []
    analyze.run(cfg)
    assert first == list(range(21)) and measured[0] == 19, "19 was the line that was cut short"
    for file in ("analysis.json", "matrices.csv", "groups.csv", "report.html"):
        assert (cfg.output / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert whole["cosines"] and whole["pairs"][0]["matrices"][0]["stable_rank"]
    assert not kept.exists()


def test_what_was_measured_of_other_models_or_pairs_counts_for_nothing(models, tmp_path):
    job = stream.Job(("a", "b"), (models / "llama0", models / "llama1"), ((0, 1),), (), frozenset({0}), "stable")
    (tmp_path / "out").mkdir()
    Journal(tmp_path / "out", job, ["x", "y"]).add(0, stream.Walker(job).batch(0))
    assert list(Journal(tmp_path / "out", job, ["x", "y"]).found) == [0]
    for other, prints in (
        (job, ["x", "z"]),
        (dataclasses.replace(job, rank="effective"), ["x", "y"]),
        (dataclasses.replace(job, pairs=((1, 0),)), ["x", "y"]),
        (dataclasses.replace(job, folders=(models / "llama0", tmp_path / "elsewhere")), ["x", "y"]),
    ):
        Journal(tmp_path / "out", job, ["x", "y"]).add(0, stream.Walker(job).batch(0))
        assert not Journal(tmp_path / "out", other, prints).found


def test_two_analyses_in_one_folder_take_nothing_from_each_other(models, tmp_path):
    job = stream.Job(("a", "b"), (models / "llama0", models / "llama1"), ((0, 1),), (), frozenset(), None)
    walker = stream.Walker(job)
    first = Journal(tmp_path, job, ["x", "y"])
    second = Journal(tmp_path, job, ["x", "z"])
    for rule, journal in enumerate((first, second, first, second)):
        journal.add(rule, walker.batch(rule))
    assert list(Journal(tmp_path, job, ["x", "z"]).found) == [1, 3]


def test_bare_models_are_named_by_their_paths_and_give_what_a_recipe_gives(models, tmp_path):
    same = [Path(shutil.copytree(models / f"llama{seed}", tmp_path / f"run{seed}/hf")) for seed in (0, 1)]
    words = [str(folder) for folder in same]
    done = prism("analyze", *words, "rank=none", "--output", tmp_path / "bare")
    assert done.returncode == 0, done.stderr
    bare = json.loads((tmp_path / "bare/analysis.json").read_text())
    assert [model["name"] for model in bare["models"]] == ["run0-hf", "run1-hf"], "as many parts as tell them apart"
    recipe = analyzed(tmp_path / "recipe", *same, rank=None)
    assert bare["pairs"][0]["groups"] == recipe["pairs"][0]["groups"]
    assert with_models(["a/base", "b/mid", "workers=2"], None)[1:] == ['output="runs/analyze-base-mid"', "workers=2"]
    assert with_models(["recipe.toml", "workers=2"], Path("1")) == ["recipe.toml", "workers=2", 'output="1"']
    assert "lr=1-hf" in with_models(["a/lr=1/hf", "a/lr=2/hf"], None)[0], "a path may hold an equals sign"
    for wrong, message in (
        ([words[0], words[0]], f"model {words[0]} is given twice"),
        ([words[0], "a.toml"], "takes a recipe or models, not both"),
        ([words[0]], "one model has changed against nothing"),
        (["/a-b/c", "/a/b/c", "/x/b/c"], "have no names that tell them apart; name them in a recipe"),
        ([words[0], "/"], "have no names"),
        ([words[0], str(tmp_path / "nowhere")], "is no folder; give a checkpoint"),
    ):
        with pytest.raises(UserError) as refused:
            analyze.run(load_recipe(None, with_models(wrong, None), analyze.Config))
        assert message in str(refused.value)
    with pytest.raises(UserError, match="--output out and output=other both say where to write; give one of them"):
        with_models([*words, "output=other"], Path("out"))


def test_the_command_says_what_it_would_do_and_does_it(models, tmp_path):
    recipe = tmp_path / "analyze.toml"
    listed = "".join(f'[[models]]\nname = "m{seed}"\npath = "{models / f"llama{seed}"}"\n' for seed in (0, 1))
    recipe.write_text(f'output = "{tmp_path / "out"}"\n{listed}')
    plan = prism("analyze", recipe, "--dry-run")
    assert plan.returncode == 0 and "update m0 to m1" in plan.stdout and not (tmp_path / "out").exists()
    done = prism("analyze", recipe)
    assert done.returncode == 0, done.stderr
    assert "attention" in done.stdout and "mean L2" in done.stdout and "report.html" in done.stdout
