"""A run that an error ends still waits for the checkpoint that is written in the background; where that hangs, its watchdog ends it."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from megatron_prism.engine import calendar, device, parallel, saving
from megatron_prism.engine.mcore import ShardedPlan
from megatron_prism.engine.watchdog_settings import WatchdogSection

output = Path(sys.argv[1])
parallel.start(device.setup("cpu"))
saving._write = lambda plan: time.sleep(90)  # a disk that does not answer
background = saving.Background()
cfg = SimpleNamespace(output=output, watchdog=WatchdogSection(timeout_minutes=0.05, long_timeout_minutes=0.05))
with calendar.attended(SimpleNamespace(cfg=cfg, progress=SimpleNamespace(step=7), background=background)):
    background.start(ShardedPlan(output / "sharded", {}, [], None, None), lambda: None, lambda: None)
    raise RuntimeError("a step went wrong")
"""


def test_a_hang_in_the_last_wait_for_a_background_save_is_the_watchdogs(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1
    assert "watchdog: no progress, the run ends" in done.stderr and ": the end of a save, step 8, for" in done.stderr, done.stderr
    assert "RuntimeError: a step went wrong" in done.stderr, "told before the wait, which does not end"
