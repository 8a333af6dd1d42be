"""The watchdog of a rank whose disk does not answer, or still shows the call of an earlier session, or that can tell nobody."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, sys, time
from pathlib import Path
from megatron_prism.engine import device, parallel, watchdog
from megatron_prism.engine.watchdog_settings import WatchdogSection

output = Path(sys.argv[1])
parallel.start(device.setup("cpu"))
with watchdog.watching(output, WatchdogSection(timeout_minutes=0.05, long_timeout_minutes=0.05), lambda: 0):
    for name in ("call", "call_0000abcd"):
        (output / "watchdog" / name).touch()
    os.mkfifo(output / "watchdog" / "rank_0.txt")  # whoever opens it to write waits for a reader, for ever
    end = time.monotonic() + 2
    while time.monotonic() < end:
        watchdog.beat("a step")
        time.sleep(0.02)
    print("went on", flush=True)
    time.sleep(300)
"""


def test_a_rank_ends_where_the_disk_does_not_answer_and_not_for_an_earlier_sessions_call(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=240, check=False)
    assert done.stdout == "went on\n", done.stderr
    assert done.returncode == 1
    assert "rank 0: no progress (a step, step 1; is at <string>:" in done.stderr, done.stderr
    assert f"{tmp_path / 'watchdog'} does not answer; it ends" in done.stderr


NO_THREAD = """
import sys, threading, time
from pathlib import Path
from megatron_prism.engine import device, parallel, watchdog
from megatron_prism.engine.watchdog_settings import WatchdogSection

def full(thread):
    raise RuntimeError("can't start new thread")

parallel.start(device.setup("cpu"))
with watchdog.watching(Path(sys.argv[1]), WatchdogSection(timeout_minutes=0.05, long_timeout_minutes=0.05), lambda: 0):
    watchdog.beat("a step")
    threading.Thread.start = full
    time.sleep(300)
"""


def test_a_rank_that_cannot_start_a_thread_to_tell_of_it_ends_all_the_same(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", NO_THREAD, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
