"""What differs between the megatron-core versions that we run on (0.16.1, and 0.19 where noted), behind one name each."""

import queue
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import OptimizerConfig


def save_sharded(state: dict[str, Any], folder: Path) -> None:
    """Write a torch_dist checkpoint from all ranks; returns when every byte is on disk. 0.19 writes through NVRx unless told otherwise.

    megatron-core hands results over through the queue of a spawned manager process, which only an asynchronous save needs: starting it costs
    seconds and imports the main module again. A queue of this process does for a synchronous save.
    """
    filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save(state, str(folder))


def load_sharded(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fill a sharded state dict from a torch_dist checkpoint of any layout. Errors: a requested tensor that the checkpoint lacks."""
    loaded: dict[str, Any] = dist_checkpointing.load(state, str(folder), strict=StrictHandling.RAISE_UNEXPECTED)
    return loaded


def optimizer_config(**settings: Any) -> OptimizerConfig:
    """megatron-core's OptimizerConfig for AdamW under the distributed optimizer."""
    return OptimizerConfig(optimizer="adam", use_distributed_optimizer=True, decoupled_weight_decay=True, **settings)
