"""What differs between the megatron-core versions that we run on (0.16.1, and 0.19 where noted), behind one name each."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import OptimizerConfig
from megatron.core.tensor_parallel import layers
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megatron_prism.engine import untrusted
from megatron_prism.engine.torch_private import StoragePrefix


@dataclass(frozen=True)
class ShardedPlan:
    """What this rank is to write of a torch_dist checkpoint, as all ranks planned it together; nothing is written yet."""

    folder: Path
    common: dict[str, Any]
    """what is no tensor and the same on all ranks, for rank 0 to write"""
    items: list[tuple[WriteItem, Any]]
    """with its tensor, on whatever device, or its io.BytesIO"""
    writer: FileSystemWriter
    metadata: Metadata | None
    """on rank 0"""

    def finish(self, results: Sequence[list[WriteResult]]) -> None:
        """Rank 0: write `.metadata`, which says where all ranks put everything."""
        assert self.metadata is not None, "rank 0's"
        self.writer.finish(self.metadata, list(results))


class _Planned(FileSystemWriter):
    """Stands where megatron-core's planning expects the writer of files, and keeps what is to be written."""

    can_run_decentralized_global_plan = True

    def prepare_decentralized_global_plan(self, local_plan: SavePlan) -> SavePlan:
        return replace(local_plan, storage_data=StoragePrefix(f"__{dist.get_rank()}_"))

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        self.items = [(item, planner.resolve_data(item)) for item in plan.items]


def plan_sharded(state: dict[str, Any], folder: Path) -> ShardedPlan:
    """Agree with all ranks on who writes what of a sharded state dict into `folder`, which is there.

    The planning is megatron-core's own; the writing is ours (`saving`), because its writers (0.16.1 to 0.19.2) are forked processes that take no
    checksums, leave the other ranks waiting where rank 0 cannot write, and copy all of a rank's views before the first byte is written.
    """
    tensors, common = save_preprocess(state)
    by_key, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(tensors, keep_only_main_replica=True)
    writer = _Planned(str(folder))
    planner = torch_dist.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    planned = save_state_dict_async_plan(torch_dist.mcore_to_pyt_state_dict(by_key, False), writer, None, 0, planner=planner)
    items, writer.items = writer.items, []  # whoever is done with the plan's tensors lets go of them
    return ShardedPlan(folder, common, items, writer, planned[0][1])


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


def gradients_for_norm(optimizer: Any) -> list[Tensor]:
    """One part's gradients on this rank, those of weights that several ranks hold on one of them alone (0.19 has another name for it than 0.16)."""
    named = getattr(optimizer, "get_main_grads_for_grad_norm", None) or optimizer.get_grads_for_grad_norm
    gradients: list[Tensor] = named()
    return gradients


def optimizer_config(**settings: Any) -> OptimizerConfig:
    """megatron-core's OptimizerConfig for AdamW under the distributed optimizer."""
    return OptimizerConfig(optimizer="adam", use_distributed_optimizer=True, decoupled_weight_decay=True, **settings)
