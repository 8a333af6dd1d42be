"""A save that cannot be written, on a disk that is really full: every rank is told the same, soon; what was saved before is whole, and goes on."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from refusals import HALFWAY, KEPT, SAVED, STEPS, train
from training import differing, final_state, metrics

from megatron_prism import artifact
from megatron_prism.engine import run_folder

ASYNC = {"checkpoint.async_save": True}
FAULTS = {
    "full": {"fault": "full"},
    "one rank": {"fault": "one rank"},
    "full early": {"fault": "full early"},
    "full, async": {"fault": "full", **ASYNC},
    "one rank, async": {"fault": "one rank", **ASYNC},
}
SOON_SECONDS = 60
"""ranks that wait for each other do so for 30 minutes"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder)], check=False, capture_output=True).returncode:
        pytest.skip("a small tmpfs cannot be mounted here (needs root)")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_every_rank_with_one_clear_error_and_the_run_goes_on_when_there_is_room(tmp_path, small_disk):
    again = {"again": {"output": "full"}, "again, async": {"output": "full, async", **ASYNC}}
    told = train(tmp_path, small_disk, {"whole": {}, **FAULTS, **again})
    for name in FAULTS:
        first, second = told[name]
        assert first == second, name
        assert ("/sharded/" if name != "full early" else "needs ") in first and f"step_{HALFWAY:08d}" in first, (name, first)
        assert re.search(r"[\d,.]+ (bytes|GiB,? and [\d.]+ GiB) are free", first) and "start the same command again" in first, (name, first)
        assert all(json.loads((small_disk / f"{name}.{rank}").read_text())["seconds"] < SOON_SECONDS for rank in range(2)), name
    for name in ("one rank", "one rank, async"):
        assert re.search(r"/__1_\d\.distcp could not be written: No space left on device; [\d,]+ bytes are free there", told[name][0]), told[name][0]
    for name in set(FAULTS) - {"full", "full, async"}:
        steps = run_folder.complete_steps(small_disk / name)
        assert [folder.name for folder in steps] == [f"step_{SAVED:08d}"]
        artifact.verify(steps[0])
        assert not run_folder.step_folder(small_disk / name, HALFWAY).exists(), "what was half-written is gone, and its room is free"
    assert len(metrics(small_disk / "one rank")) == HALFWAY and len(metrics(small_disk / "one rank, async")) <= STEPS
    for name in ("full", "full, async"):
        assert told["again" + name.removeprefix("full")] == ["", ""]
        assert [[line[key] for key in KEPT] for line in metrics(small_disk / name)] == [
            [line[key] for key in KEPT] for line in metrics(small_disk / "whole")
        ]
        assert differing(final_state(small_disk / name), final_state(small_disk / "whole")) == []
