"""Started on two ranks by test_stopped_ranks: runs whose second rank alone hears SIGTERM, in its second step. stopped_ranks.py CASES.json."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from megatron_prism.config import load_recipe
from megatron_prism.engine import loop, parallel
from megatron_prism.engine.recipe import TrainConfig
from megatron_prism.rl import loop as rl_loop
from megatron_prism.rl.recipe import RLConfig


def told_in_step(number: int, step: Callable[..., Any]) -> Callable[..., Any]:
    """The step, in which rank 1 gets SIGTERM the so manieth time it is taken."""
    taken: list[int] = []

    def told(run: Any) -> Any:
        taken.append(1)
        if dist.get_rank() == 1 and len(taken) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run)

    return told


cases = json.loads(Path(sys.argv[1]).read_text())
with mock.patch.object(loop, "_step", told_in_step(2, loop._step)):
    loop.train(load_recipe(None, cases["train"], TrainConfig))
with mock.patch.object(rl_loop, "_step", told_in_step(2, rl_loop._step)):
    rl_loop.reinforce(load_recipe(None, cases["rl"], RLConfig))
parallel.stop()
