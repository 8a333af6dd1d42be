"""Started on two ranks by test_stale_ranks: an RL run, and one that goes on from its first step, where rank 1 lists the folder of before.

stale_ranks.py CASES.json: {"whole": ["key=value", ...], "resumed": [...]}
"""

import json
import shutil
import sys
from pathlib import Path
from unittest import mock

import torch.distributed as dist

from megatron_prism import artifact
from megatron_prism.config import load_recipe
from megatron_prism.engine import checkpoint, parallel, run_folder, run_lock
from megatron_prism.rl import loop
from megatron_prism.rl.recipe import RLConfig

COMPLETE_STEPS = run_folder.complete_steps


def remembered(run: Path) -> list[Path]:
    """What a client of a network's file system lists that has asked a minute ago."""
    return COMPLETE_STEPS(run)[:0]


whole, resumed = (load_recipe(None, overrides, RLConfig) for overrides in json.loads(Path(sys.argv[1]).read_text()).values())
loop.reinforce(whole)
with run_lock.held(resumed.output):
    if dist.get_rank() == 0:
        shutil.copytree(whole.output, resumed.output, dirs_exist_ok=True)
        (resumed.output / artifact.COMPLETE).unlink()
        checkpoint.remove(run_folder.step_folder(resumed.output, 2))
        run_folder.step_folder(resumed.output, 7).mkdir()  # half-written
    dist.barrier()
    with mock.patch.object(run_folder, "complete_steps", remembered if dist.get_rank() == 1 else COMPLETE_STEPS):
        loop.reinforce(resumed)
parallel.stop()
