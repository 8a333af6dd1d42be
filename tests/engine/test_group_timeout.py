"""How long the ranks of a process group wait for each other: as the call says, else as the launch says, else half an hour; in a run at least
as long as its watchdog allows a rank."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from multirank import run_ranks

PROGRAM = """
import sys
import torch
import torch.distributed as dist
from megatron_prism.engine import parallel
parallel.start(torch.device("cpu"), *map(int, sys.argv[1:]))
print(dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds() / 60)
parallel.stop()
"""


@pytest.mark.parametrize(("launch", "call", "minutes"), [(None, [], 30.0), ("7", [], 7.0), ("7", ["60"], 60.0)])
def test_the_call_wins_over_the_launch_which_wins_over_the_default(launch: str | None, call: list[str], minutes: float) -> None:
    env = {key: value for key, value in os.environ.items() if key not in ("PRISM_TIMEOUT_MINUTES", "RANK")}
    env |= {"PRISM_TIMEOUT_MINUTES": launch} if launch else {}
    done = subprocess.run([sys.executable, "-c", PROGRAM, *call], env=env, capture_output=True, text=True, timeout=120, check=True)
    assert float(done.stdout.splitlines()[-1]) == minutes


def test_ranks_wait_for_one_that_works_as_long_as_the_watchdog_allows_it(tmp_path: Path) -> None:
    script = Path(__file__).with_name("patient_ranks.py")
    done = run_ranks(script, 2, str(tmp_path), "watched")
    assert done.stdout.split() == ["45.0"] * 6, "what is allowed to a rank, and five minutes in which it is named"
    alone = run_ranks(script, 2, str(tmp_path), "alone", check=False)
    assert alone.returncode == 1 and "imed out" in alone.stderr, f"the fault is one: {alone.stderr}"
