"""A training that meets five faults, of which four end it, goes through the weights of one that met none: bit for bit, at every checkpoint."""

from pathlib import Path

import pytest
from chaos import summary, survive

FAULTS = ["kill", "full", "flip", "disk", "nan"]
SEED = 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_checkpoint_after_a_fault_is_the_unbroken_runs_bit_for_bit(tmp_path: Path) -> None:
    told: list[str] = []
    report = survive(FAULTS, SEED, 4, "cpu", tmp_path, told.append)
    said = "\n".join([*told, summary(report)])
    assert report["good"] == report["faults"] >= len(FAULTS) - 1, said
    assert report["losses_equal"] and report["interruptions"] == report["faults"], said
    assert all(one["compared"] for one in report["outcomes"]), said
