"""Two runs in one folder: the second is refused, and says who has it; a killed one leaves no lock."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prism.engine import run_lock
from megatron_prism.errors import UserError

HOLDS = """
import sys, time
from pathlib import Path
from megatron_prism.engine import run_lock
with run_lock.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_while_another_process_has_the_folder_and_not_after_it_was_killed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    other = subprocess.Popen([sys.executable, "-c", HOLDS, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"is being written by process {other.pid} on "), run_lock.held(run):
            pass
    finally:
        other.kill()
        other.wait()
    assert (run / run_lock.FILE).is_file(), "what a kill leaves"
    with run_lock.held(run):
        assert str(os.getpid()) in (run / run_lock.FILE).read_text()
    assert not run.exists(), "nothing was begun in it"
