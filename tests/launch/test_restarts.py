"""`prism launch local`: what is killed is started again and ends as if nothing had been; what was told to stop answers 75 and goes on elsewhere."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from prism_command import prism
from training import differing, final_state, from_random, largest_difference, metrics, recipe

from megatron_prism import artifact

STEPS = 40
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("restarts")


def _words(root: Path, name: str, *more: str) -> list[str]:
    settings = recipe(root, root / name, steps=STEPS, checkpoint__save_interval=5, global_batch=8, **from_random(root))
    return ["launch", "local", str(root / "train.toml"), *settings, *more]


@pytest.fixture(scope="module")
def unbroken(root: Path) -> Path:
    (root / "train.toml").touch()
    done = prism(*_words(root, "unbroken", "--ranks", "2"))
    assert done.returncode == 0, done.stderr
    return root / "unbroken"


def _start(root: Path, name: str, *more: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_prism", *_words(root, name, *more)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def _wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    end = time.monotonic() + 100
    while not (run / "metrics.jsonl").exists() or not metrics(run) or metrics(run)[-1]["step"] < step:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


def _rank(process: subprocess.Popen[str], number: int) -> psutil.Process:
    """A rank's process."""
    below = psutil.Process(process.pid).children(recursive=True)
    (found,) = [one for one in below if one.environ().get("RANK") == str(number) and "torch.distributed.run" not in one.cmdline()]
    return found


def test_a_rank_that_is_killed_ends_the_job_within_seconds_and_the_losses_are_the_unbroken_runs(root: Path, unbroken: Path) -> None:
    process = _start(root, "killed", "--ranks", "2", "--restarts", "1")
    _wait_for_step(process, root / "killed", 7)
    other = _rank(process, 0)
    _rank(process, 1).kill()
    killed = time.monotonic()
    other.wait(20)
    seconds = time.monotonic() - killed
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 0, said
    assert seconds < 15, "the other rank does not wait for the dead one"
    assert "ended by SIGKILL" in said and "start 1 of at most 1 at step 5" in said
    lines, expected = metrics(root / "killed"), metrics(unbroken)
    assert [(line["step"], line["loss"], line["grad_norm"]) for line in lines] == [
        (line["step"], line["loss"], line["grad_norm"]) for line in expected
    ]
    assert not differing(final_state(root / "killed"), final_state(unbroken))


def test_told_to_stop_it_answers_75_and_goes_on_on_fewer_ranks_and_then_on_more(root: Path, unbroken: Path) -> None:
    run = root / "resized"
    process = _start(root, "resized", "--ranks", "2", "--restarts", "3")
    _wait_for_step(process, run, 3)
    process.send_signal(signal.SIGUSR1)  # as a cluster does it before its time limit, to the process that it knows
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 75, said
    assert "start the same command again to go on" in said and "at most" not in said, "not started again by itself"
    stopped = metrics(run)[-1]["step"]
    fewer = prism(*_words(root, "resized", "--ranks", "1", "time_limit_minutes=1e-6"))
    assert fewer.returncode == 75, fewer.stderr
    more = prism(*_words(root, "resized", "--ranks", "2"))
    assert more.returncode == 0 and artifact.is_complete(run), more.stderr
    lines, expected = metrics(run), metrics(unbroken)
    assert [line["step"] for line in lines] == [line["step"] for line in expected] == list(range(1, STEPS + 1))
    after = stopped + 5  # as in the laws of layouts: over many steps at this learning rate rounding grows
    assert largest_difference(lines[:after], expected[:after]) < 1e-5


def test_a_second_sigterm_ends_a_run_at_once_also_where_it_hangs(tmp_path: Path) -> None:
    script = tmp_path / "hangs.py"
    script.write_text(
        "import threading, time\n"
        "from megatron_prism.engine import stop_signals\n"
        "with stop_signals.heard(lambda: print('heard', flush=True)):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(0.5)\n"
        "    import ctypes; ctypes.PyDLL(None).sleep(600)\n"  # compiled code that keeps the interpreter: only signals reach it
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "heard\n"
    time.sleep(3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143
