"""Started on two ranks by test_watchdog_ranks: runs in which rank 1 is slow, and then one in which it stands still in its fourth step.

hung_ranks.py CASES.json sleep|stop
CASES: {"slow": [...] | null, "hung": [...]}, overrides each
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from megatron_prism.config import load_recipe
from megatron_prism.engine import loop, parallel, watchdog
from megatron_prism.engine.model import LanguageModel
from megatron_prism.engine.recipe import TrainConfig

cases, ending = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]


def slow_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A model that is slow on rank 1."""
    if dist.get_rank() == 1:
        time.sleep(0.05)
    return forward(self, *args, **kwargs)


def stuck_step(run: loop.Run) -> Any:
    """A step that rank 1 does not end."""
    if run.progress.step == 3 and dist.get_rank() == 1:
        watchdog.beat("a planted fault")
        if ending == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        stand_still()
    return step(run)


def stand_still() -> None:
    """For ever."""
    time.sleep(10_000)


forward, step = LanguageModel.forward, loop._step
if cases["slow"]:
    with mock.patch.object(LanguageModel, "forward", slow_forward):
        loop.train(load_recipe(None, cases["slow"], TrainConfig))
watchdog.record_flights(Path(json.loads(cases["hung"][0].split("=", 1)[1])))
with mock.patch.object(loop, "_step", stuck_step):
    loop.train(load_recipe(None, cases["hung"], TrainConfig))
parallel.stop()
