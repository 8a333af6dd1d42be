"""What CUDA graphs replay, run eagerly on CPUs: micro-batches one after the other are megatron-core's schedule, bit for bit."""

from typing import Any

import pytest
import torch
from training import differing, final_state, from_random, largest_difference, read_state, run_cases

from megatron_prism import artifact
from megatron_prism.engine import run_folder

CASES = {"schedule": {}, "one_by_one": {"fault": "one_by_one"}}


@pytest.mark.parametrize("ranks", [1, 2])
def test_micro_batches_one_by_one_are_megatron_cores_schedule(tmp_path, ranks):
    """Three micro-batches a rank with masks of their own, and two validations: losses by source, norms, weights and moments."""
    shared = {"global_batch": 3 * ranks, "steps": 4, "validation__interval": 2, "validation__batches": 1, **from_random(tmp_path)}
    lines = run_cases(tmp_path, ranks, CASES, folder=tmp_path / "runs", **shared)
    kept = [[{key: line[key] for key in line if key.startswith("loss") or key == "grad_norm"} for line in lines[case]] for case in CASES]
    assert len(kept[0]) == 4 and "loss/code" in kept[0][0] | kept[0][1] | kept[0][2]
    assert kept[0] == kept[1]
    found, expected = (final_state(tmp_path / "runs" / case) for case in ("one_by_one", "schedule"))
    assert differing(found, expected) == []


def test_exchanges_after_the_passes_are_those_beside_them_bit_for_bit(tmp_path):
    """Three micro-batches on each of two ranks, several buckets: gradients' norms, losses, weights and moments are those of a run that overlaps."""
    cases = {"beside": {"fault": "overlap_small_buckets"}, "after": {"fault": "one_by_one_small_buckets"}}
    lines = run_cases(tmp_path, 2, cases, folder=tmp_path / "runs", global_batch=6, steps=8, **from_random(tmp_path))
    kept = [[{key: line[key] for key in line if key.startswith("loss") or key == "grad_norm"} for line in lines[case]] for case in cases]
    assert len(kept[0]) == 8 and kept[0] == kept[1]
    found, expected = (final_state(tmp_path / "runs" / case) for case in ("after", "beside"))
    assert differing(found, expected) == []
    assert [artifact.provenance(tmp_path / "runs" / case)["cuda_graphs"] for case in cases] == [False, True]


def test_a_checkpoint_of_one_bucket_goes_on_in_several(tmp_path):
    """As a run with graphs of before buckets were equal, resumed without: what is stored is cut by weights, not by buckets."""
    runs, common = tmp_path / "runs", {"global_batch": 4, "steps": 3, "checkpoint__save_interval": 2, "checkpoint__keep_last": None}
    lines = run_cases(tmp_path, 2, {"one": {"fault": "one_by_one"}}, folder=runs, **common, **from_random(tmp_path))
    saved = run_folder.step_folder(runs / "one", 2)
    go_on = {"set": {"model__checkpoint": saved, "model__load": "all"}}
    cases = {"same": go_on, "several": {**go_on, "fault": "overlap_small_buckets"}}
    lines |= run_cases(tmp_path, 2, cases, folder=runs, **common)
    assert [line["step"] for line in lines["several"]] == [3]
    assert largest_difference(lines["same"], lines["one"][2:]) == 0
    assert largest_difference(lines["several"], lines["one"][2:]) < 1e-6
    assert _largest(final_state(runs / "several"), final_state(runs / "one")) < 1e-5 < _largest(final_state(runs / "one"), read_state(saved))


def _largest(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Largest difference of any number of two states' tensors."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - value).abs().max()) for name, value in expected.items() if torch.is_tensor(value))
