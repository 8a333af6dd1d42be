"""What differs between the megatron-core versions that we run on (0.16.1, and 0.19 where noted), behind one name each."""

import queue
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import OptimizerConfig
from megatron.core.tensor_parallel import layers

from megatron_prism.engine import untrusted


def save_sharded(state: dict[str, Any], folder: Path) -> None:
    """Write a torch_dist checkpoint from all ranks; returns when every byte is on disk. 0.19 writes through NVRx unless told otherwise.

    megatron-core hands results over through the queue of a spawned manager process, which only an asynchronous save needs: starting it costs
    seconds and imports the main module again. A queue of this process does for a synchronous save.
    """
    filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save(state, str(folder))


def load_sharded(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fill a sharded state dict from a torch_dist checkpoint of any layout. Errors: a requested tensor that it lacks; UserError for pickled code."""
    with untrusted.loading(folder):
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(folder), strict=StrictHandling.RAISE_UNEXPECTED)
    return loaded


@contextmanager
def gradient_fusion_without_apex() -> Iterator[None]:
    """Build layers with gradient_accumulation_fusion on a machine without NVIDIA Apex.

    TransformerEngine's layers read the flag and bring their own kernel; megatron-core's linear layers (of which only the LM head is left, and that
    must not use it) refuse to be built with it (0.16.1 to 0.19.2, tensor_parallel/layers.py).
    """
    before = layers._grad_accum_fusion_available
    layers._grad_accum_fusion_available = True
    try:
        yield
    finally:
        layers._grad_accum_fusion_available = before


def optimizer_config(**settings: Any) -> OptimizerConfig:
    """megatron-core's OptimizerConfig for AdamW under the distributed optimizer."""
    return OptimizerConfig(optimizer="adam", use_distributed_optimizer=True, decoupled_weight_decay=True, **settings)
