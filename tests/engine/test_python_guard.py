"""A rank whose compiled code keeps Python's lock for ever is ended from outside; one that was stopped for a while is not."""

import signal
import subprocess
import sys
import time
from pathlib import Path

ALONE = """
import ctypes, time
from megatron_prism.engine.python_guard import IN_A_STEP, Guard
guard = Guard(3, (2.0, 1000.0, 1000.0))
print("guarded", flush=True)
end = time.monotonic() + 7  # this clock goes on while the process is stopped
while time.monotonic() < end:
    guard.tell(IN_A_STEP)
    time.sleep(0.05)
print("went on", flush=True)
ctypes.PyDLL(None).sleep(300)  # keeps Python's lock
"""
WATCHED = """
import ctypes, sys
from pathlib import Path
from megatron_prism.engine import device, parallel, watchdog
from megatron_prism.engine.watchdog_settings import WatchdogSection
parallel.start(device.setup("cpu"))
with watchdog.watching(Path(sys.argv[1]), WatchdogSection(timeout_minutes=0.05, long_timeout_minutes=0.05), lambda: 0):
    ctypes.PyDLL(None).sleep(300)
"""


def test_a_rank_that_keeps_pythons_lock_is_ended_and_one_that_was_stopped_meanwhile_is_not() -> None:
    rank = subprocess.Popen([sys.executable, "-c", ALONE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert rank.stdout is not None and rank.stdout.readline() == "guarded\n"
    rank.send_signal(signal.SIGSTOP)
    time.sleep(5)  # twice as long as it may say nothing
    rank.send_signal(signal.SIGCONT)
    said, errors = rank.communicate(timeout=60)
    assert said == "went on\n" and rank.returncode == -signal.SIGKILL
    assert f"rank 3 (process {rank.pid}): Python has not run for" in errors


def test_a_run_on_one_rank_ends_where_compiled_code_keeps_pythons_lock_and_shows_its_stack(tmp_path: Path) -> None:
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", WATCHED, str(tmp_path)], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == -signal.SIGKILL and time.monotonic() - begun < 200, done.stderr
    assert "compiled code keeps its lock; it is ended" in done.stderr
    assert 'File "<string>", line 8 in <module>' in done.stderr, "faulthandler's thread needs no lock"


def test_a_guard_ends_with_its_rank() -> None:
    script = "from megatron_prism.engine.python_guard import Guard\nguard = Guard(0, (1000.0,) * 3)\nprint(guard._process.pid, flush=True)"
    rank = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{rank.stdout.strip()}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{rank.stdout.strip()}").exists()
