"""Started on two ranks by test_group_timeout: rank 0 works longer than a group's ranks wait for each other, but within the watchdog's time.

patient_ranks.py FOLDER watched|alone
"""

import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist

from megatron_prism.engine import calendar, parallel
from megatron_prism.engine.watchdog_settings import WatchdogSection

folder, how = Path(sys.argv[1]), sys.argv[2]
cfg = SimpleNamespace(output=folder, watchdog=WatchdogSection(long_timeout_minutes=40))
run: Any = SimpleNamespace(cfg=cfg, progress=SimpleNamespace(step=0), background=None, stop_asked=False)
parallel.start(torch.device("cpu"))
group = dist.new_group(timeout=timedelta(seconds=2))
with calendar.attended(run) if how == "watched" else nullcontext():
    if how == "watched":
        calendar.wait_as_allowed(run)
    if dist.get_rank() == 0:
        time.sleep(5)
    dist.barrier(group)
    later = cast(Any, parallel.host_group())
    for one in (dist.group.WORLD, group, later):
        print(one._get_backend(torch.device("cpu")).options._timeout.total_seconds() / 60)
parallel.stop()
