"""A job that was told to stop before it had anything to save is not started again, however often it may be."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_prism.launch import job

LOADING = """
import pathlib, sys, time
starts = pathlib.Path(sys.argv[1])
starts.write_text(starts.read_text() + "x")
time.sleep(60 if len(starts.read_text()) == 1 else 0)
"""


def test_a_job_that_a_signal_ends_while_it_loads_is_not_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = tmp_path / "starts"
    starts.touch()
    monkeypatch.setattr(job, "torchrun_argv", lambda asked: [sys.executable, "-c", LOADING, str(starts)])

    def tell() -> None:
        while not starts.read_text():
            time.sleep(0.05)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    telling = threading.Thread(target=tell)
    telling.start()
    outcome = job.run_local(job.Job(stage="train"), tmp_path / "log", tmp_path / "run", restarts=3)
    telling.join()
    assert outcome.status == 128 + signal.SIGTERM
    assert starts.read_text() == "x", "started once"
