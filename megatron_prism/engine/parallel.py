"""Process groups: starting torch.distributed, and megatron-core's mesh for a checked plan. The one file that names parallel_state.

Called on every rank. Groups are built once and handed on; nothing else looks them up.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_prism.config import TIMEOUT_MINUTES
from megatron_prism.engine import torch_private
from megatron_prism.engine.device import backend
from megatron_prism.errors import StoppedEarly, UserError
from megatron_prism.planning.layout import ParallelPlan

logger = logging.getLogger(__name__)
_timeout_minutes: float = 30
"""how long the ranks of a group wait for each other, in every group: what a start was given, or `wait_longer` since"""
_layout: tuple[int, int, int | None, int, tuple[int, int] | None] | None = None
"""tp, pp, vpp, cp and its levels of the groups that exist: making them again costs seconds, and megatron-core never frees the old ones"""


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the plan, and the groups that megatron-core needs."""

    plan: ParallelPlan
    groups: ProcessGroupCollection
    rank: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    cp_rank: int

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.pp_rank == self.plan.pp - 1


def world_size() -> int:
    """Ranks of this launch, known before torch.distributed starts (torchrun and Slurm set it; 1 for a plain process)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(device: torch.device, timeout_minutes: int | None = None) -> None:
    """Join the default process group; a plain process becomes a world of one. A second call does nothing.

    timeout_minutes: how long ranks wait for each other, in this group and in those of every mesh; None: as the launch says, else 30.
    """
    global _timeout_minutes
    if dist.is_initialized():
        return
    timeout_minutes = timeout_minutes or int(os.environ.get(TIMEOUT_MINUTES, "30"))
    _timeout_minutes = timeout_minutes
    if "RANK" in os.environ:
        dist.init_process_group(backend(device), timeout=timedelta(minutes=timeout_minutes))
    else:
        dist.init_process_group(backend(device), store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(minutes=timeout_minutes))


def wait_longer(minutes: float) -> None:
    """Let the ranks of all groups, those to come too, wait for each other for at least so long: a rank may do long work that the others wait for.

    For a run whose watchdog says when it hangs, and who was behind: groups that gave up before would end it, and say neither. A start keeps the time
    that it was given: until the watchdog looks, nobody else would end ranks that do not find each other.
    """
    global _timeout_minutes
    if minutes <= _timeout_minutes:
        return
    try:
        set_timeout, groups = torch_private.find("torch.distributed.distributed_c10d", "_set_pg_timeout", "_world")
    except UserError as error:
        if dist.get_rank() == 0:
            logger.warning("process groups give up after %g min, though the run's watchdog allows %g: %s", _timeout_minutes, minutes, error)
        return
    _timeout_minutes = minutes
    for group in list(groups.pg_map):
        set_timeout(timedelta(minutes=minutes), group)


def host_group() -> dist.ProcessGroup | None:
    """A group of all ranks through host memory, for a thread that exchanges words while the main thread does other things; None for one rank.

    Called on every rank at the same point.
    """
    if dist.get_world_size() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(minutes=_timeout_minutes))


def build_mesh(plan: ParallelPlan, seed: int) -> Mesh:
    """Build megatron-core's groups for a plan, unless those of this layout are there already, and seed its random number trackers."""
    global _layout
    levels = plan.hierarchical_context_parallel_sizes
    layout = (plan.tp, plan.pp, plan.vpp, plan.cp, levels)
    if _layout != layout or not parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=plan.tp,
            pipeline_model_parallel_size=plan.pp,
            virtual_pipeline_model_parallel_size=plan.vpp,
            context_parallel_size=plan.cp,
            hierarchical_context_parallel_sizes=None if levels is None else list(levels),
            distributed_timeout_minutes=_timeout_minutes,  # megatron-core's own is 30, whatever the default group has
        )
        _layout = layout
    # megatron-core tells tensor-parallel ranks apart, not stages: they would all start from the same layers and draw the same dropout
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return Mesh(
        plan=plan,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        rank=dist.get_rank(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        cp_rank=parallel_state.get_context_parallel_rank(),
    )


@contextmanager
def ending() -> Iterator[None]:
    """Around a stage's work: the process groups end with it.

    After an error on NCCL they are left to the process's end: to destroy them waits for exchanges that other ranks may never join, and the error
    would be told by nobody.
    """
    try:
        yield
    except StoppedEarly:
        stop()
        raise
    except BaseException:
        if not (dist.is_initialized() and dist.get_backend() == "nccl"):
            stop()
        raise
    stop()


def stop() -> None:
    """Leave the process groups, so that the process can end without warnings."""
    global _layout
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        _layout = None
        dist.destroy_process_group()
