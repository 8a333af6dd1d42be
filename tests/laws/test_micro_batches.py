"""What CUDA graphs replay, run eagerly on CPUs: micro-batches one after the other are megatron-core's schedule, bit for bit."""

import pytest
from training import differing, final_state, from_random, run_cases

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
