"""A NaN that spreads to every rank is traced to the rank, layer, pass and samples that it came from, under every kind of parallelism."""

import json
from pathlib import Path
from typing import Any

import pytest
from bad_steps_plants import POISON, SAMPLE, SPIKE_SET, Planted, activation
from multirank import run_ranks
from training import from_random, largest_difference, metrics, recipe

from megatron_prism.config import load_recipe
from megatron_prism.engine import bad_steps, loop, run_folder
from megatron_prism.engine.recipe import TrainConfig

pytestmark = [pytest.mark.usefixtures("leave_groups"), pytest.mark.slow]
RANK_1 = {"rank": 1, "tp": 0, "pp": 0, "cp": 0, "dp": 0}
COMMON = {"steps": 3, "bad_steps__max_skipped": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs on two ranks."""
    root = tmp_path_factory.mktemp("bad_steps")
    (root / "common.json").write_text(json.dumps(recipe(root, root, **from_random(root), **COMMON)))
    run_ranks(Path(__file__).parent / "bad_step_ranks.py", 2, str(root / "common.json"), str(root))
    return root


def record(root: Path, name: str, step: int = 1) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / name / "bad_steps" / f"step_{step:08d}.json").read_text())
    (line,) = [line for line in map(json.loads, (root / name / "metrics.jsonl").read_text().splitlines()) if "bad_step" in line]
    assert line["step"] == step and line["bad_step"]["origin"] == found["origin"] and line["bad_step"]["action"] == found["action"]
    return found


CASES = {
    "pp, activation": ("activation", "decoder.layers.2.mlp.linear_fc1", False, {**RANK_1, "pp": 1}),
    "vpp, gradient": ("gradient", "decoder.layers.2.mlp.linear_fc1", True, {**RANK_1, "rank": 0}),
    "tp, weight": ("activation", "decoder.layers.3.mlp.linear_fc2", False, {**RANK_1, "tp": 1}),
    "sp, weight gradient": ("weight gradient", "decoder.layers.1.self_attention.linear_qkv.weight", True, {**RANK_1, "tp": 1}),
    "cp, activation": ("activation", "decoder.layers.0.self_attention.linear_qkv", False, {**RANK_1, "cp": 1}),
}


@pytest.mark.parametrize("name", list(CASES))
def test_the_first_tensor_that_is_no_number_is_named_with_its_rank_and_its_layer_in_the_whole_model(runs, name):
    what, module, backward, place = CASES[name]
    found = record(runs, name)
    first = found["origin"]["first"]
    assert (first["what"], first["module"], first["backward"], first["micro_batch"]) == (what, module, backward, 0)
    assert found["origin"]["ranks"] == [place] and found["origin"]["repeated"] and first["layer"] == int(module.split(".")[2])
    assert (first["weights"], found["origin"]["weights"]) == (
        ([f"{module}.weight"], {"1": [f"{module}.weight"]}) if name == "tp, weight" else ([], {})
    )
    assert len(found["origin"]["micro_batches"]) == 8 and found["action"] == "stop"
    for rank in range(2):
        said = (runs / f"{name}_{rank}.txt").read_text()
        assert said.startswith("step 1: loss ") and f"{module} (layer {first['layer']} of 0 to 3), on rank {place['rank']}" in said


def test_the_sample_that_makes_it_is_named_with_its_source_and_documents_and_the_rank_that_had_it(runs):
    found = record(runs, "dp, sample", step=2)
    assert found["origin"]["micro_batches"] == [SAMPLE - 8] and found["origin"]["ranks"] == [{**RANK_1, "dp": 1}]
    assert found["origin"]["first"]["module"] == "decoder.layers.1.mlp" and found["origin"]["first"]["count"] == 1
    (sample,) = found["samples"]
    assert sample["sample"] == SAMPLE and sample["source"] in ("code", "math") and sample["documents"]
    assert f"samples 8 to 15. NaN first in the forward pass of micro-batch {SAMPLE - 8}: " in (runs / "dp, sample_0.txt").read_text()


def test_a_step_that_one_rank_s_sample_spoilt_is_left_out_on_all_of_them(runs):
    name = "dp, sample, skipped"
    assert record(runs, name, step=2)["action"] == "skip" and (runs / f"{name}_1.txt").read_text() == "finished"
    cfg = load_recipe(None, [*json.loads((runs / "common.json").read_text()), f"output={runs / 'alone'}", "bad_steps.on_nan=skip"], TrainConfig)
    with Planted(activation(1, "mlp", rank=0, sample=SAMPLE)):
        loop.train(cfg)
    assert [line["step"] for line in metrics(runs / name)] == [1, 3]
    assert largest_difference(metrics(runs / name), metrics(runs / "alone")) < 1e-5
    for run in (runs / name, runs / "alone"):
        newest = run_folder.newest(run)
        assert newest is not None
        progress = run_folder.read_state(newest)["progress"]
        assert progress["step"] == 3 and progress["samples"] == 24
        assert progress["data"]["bad_steps"] == {"skipped": [{"step": 2, "first_sample": 8, "samples": 8}]}


def test_ranks_go_back_together_and_leave_out_the_same_samples_as_one_rank_does(runs):
    cfg = load_recipe(None, [*json.loads((runs / "common.json").read_text()), f"output={runs / 'alone, spike'}", *SPIKE_SET], TrainConfig)
    with Planted(POISON):
        loop.train(cfg)
    name = "dp, spike"
    assert (runs / f"{name}_1.txt").read_text() == "finished"
    for (_, found), (_, wanted) in zip(bad_steps.rollbacks(runs / name), bad_steps.rollbacks(runs / "alone, spike"), strict=True):
        assert all(found[key] == wanted[key] for key in ("step", "to_step", "first_sample", "num_samples"))
    assert [line["step"] for line in metrics(runs / name)] == list(range(1, 19))
    assert largest_difference(metrics(runs / name), metrics(runs / "alone, spike")) < 1e-4
