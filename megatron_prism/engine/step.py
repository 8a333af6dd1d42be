"""One training step, and one forward-only pass, over a global batch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import tee
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_prism.engine import watchdog
from megatron_prism.engine.cuda_graphs import MicroBatchGraphs
from megatron_prism.engine.data import MicroBatch, SampleReader
from megatron_prism.engine.loss import LossParts, masked_loss
from megatron_prism.engine.optimizer import Optimizer, set_learning_rate
from megatron_prism.engine.parallel import Mesh
from megatron_prism.engine.stragglers import Clock
from megatron_prism.errors import DivergenceError as DivergenceError

Batch = TypeVar("Batch", bound=MicroBatch)


@dataclass
class Engine:
    """What a step needs: the wrapped chunks, their optimizer, this rank's mesh and device. clock: of what its own work takes.

    graphs: what a training step takes its gradients by in place of megatron-core's schedule; None: nothing does. attention: what its core runs on.
    """

    model: list[DistributedDataParallel]
    optimizer: Optimizer
    mesh: Mesh
    device: torch.device
    graphs: MicroBatchGraphs | None = None
    attention: str = ""
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.clock.device = self.device
        if self.graphs is not None:
            self.clock.measured = "forward and backward"

    def make_room(self) -> None:
        """Before other work than steps, which finds the memory that eager steps leave: graphs keep the room of a whole pass."""
        if self.graphs is not None:
            self.graphs.forget()


@dataclass(frozen=True)
class StepReport:
    """by_source: float64 [sources, 2], loss sum and token count over all ranks, on the host; signal: as handed in, summed over ranks.

    applied: whether the weights were updated; where loss or gradients are no numbers they, the moments and Adam's count of steps are as before.
    """

    by_source: Tensor
    grad_norm: float
    signal: int
    applied: bool = True

    @property
    def loss(self) -> float:
        """Mean loss over the unmasked tokens of the global batch."""
        total, tokens = self.by_source.sum(dim=0).tolist()
        return total / max(tokens, 1.0)


def train_step(engine: Engine, data: SampleReader, first_sample: int, lr: float, weight_decay: float, signal: int = 0) -> StepReport:
    """Gradients of one global batch, reduced, clipped and applied, unless they or the loss are no numbers: the device decides, nobody waits for it.

    signal: a number that this rank tells all others with the loss (1: please stop), so that no extra exchange is needed.
    """
    for chunk in engine.model:
        chunk.zero_grad_buffer()
    engine.optimizer.zero_grad()
    if engine.graphs is None:
        parts = forward_backward(engine, data, first_sample, forward_only=False)
    else:
        batches = data.step(first_sample, engine.mesh, engine.device)
        parts = engine.graphs.forward_backward(engine.model[0], batches, engine.mesh.plan.num_microbatches, len(data.names), engine.clock)
    watchdog.beat("the optimizer's step")
    set_learning_rate(engine.optimizer, lr, weight_decay)
    grad_norm, usable = engine.optimizer.step(parts)
    report = _over_all_ranks(engine, parts, grad_norm, signal, usable)
    engine.clock.end_step(data.waited_seconds)
    if not report.applied:
        engine.optimizer.uncount()
    return report


def evaluate_step(engine: Engine, data: SampleReader, first_sample: int) -> Tensor:
    """Loss sums and token counts of one global batch by source, float64 [sources, 2], over all ranks; no gradients, no dropout."""
    with evaluating(engine):
        parts = forward_backward(engine, data, first_sample, forward_only=True)
    nothing = torch.zeros((), device=engine.device)
    return _over_all_ranks(engine, parts, nothing, signal=0, usable=nothing).by_source


@contextmanager
def evaluating(engine: Engine) -> Iterator[None]:
    """No gradients, no dropout."""
    for chunk in engine.model:
        chunk.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for chunk in engine.model:
            chunk.train()


def forward_backward(engine: Engine, data: SampleReader, first_sample: int, forward_only: bool) -> Tensor:
    """Run this rank's micro-batches of a global batch; loss sums and token counts of its samples, [sources, 2]."""
    num_sources = len(data.names)
    reports = run_schedule(
        engine,
        data.step(first_sample, engine.mesh, engine.device),
        engine.mesh.plan.num_microbatches,
        data.seq_len,
        lambda batch: masked_loss(batch, num_sources),
        forward_only,
        clock=None if forward_only else engine.clock,
    )
    total = torch.zeros(num_sources, 2, dtype=torch.float64, device=engine.device)
    for report in reports:
        total += report["by_source"]
    return total


def run_schedule(
    engine: Engine,
    batches: Iterator[Batch],
    num_microbatches: int,
    seq_len: int,
    loss_of: Callable[[Batch], Callable[[Tensor], LossParts]],
    forward_only: bool,
    loss_is_masked_sum: bool = True,
    clock: Clock | None = None,
) -> list[dict[str, Tensor]]:
    """Run megatron-core's pipeline schedule over this rank's micro-batches; what the losses report, on the last stage (elsewhere nothing).

    loss_of: for a micro-batch, what makes a loss of each token's. loss_is_masked_sum: it is the sum over the loss mask, which spares the LM head a
    product; any other function of the tokens' losses is right without. clock: of the forward passes.
    """

    def forward_step(batches: Iterator[Batch], chunk: Any) -> Any:
        watchdog.beat("reading a micro-batch")
        batch = next(batches)
        watchdog.beat("forward and backward")
        mask = batch.loss_mask if loss_is_masked_sum else None
        with nullcontext() if clock is None else clock.forward():
            output = chunk(batch.tokens, batch.positions, None, labels=batch.labels, loss_mask=mask, packed_seq_params=batch.packed_seq_params)
        return output, loss_of(batch)

    streams = tee(batches, len(engine.model))  # each chunk draws every micro-batch, read once
    several = len(engine.model) > 1
    reports: list[dict[str, Tensor]] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=list(streams) if several else streams[0],
        model=engine.model if several else engine.model[0],
        num_microbatches=num_microbatches,
        seq_length=seq_len,
        micro_batch_size=engine.mesh.plan.micro_batch,
        forward_only=forward_only,
    )
    return reports


def _over_all_ranks(engine: Engine, parts: Tensor, grad_norm: Tensor, signal: int, usable: Tensor) -> StepReport:
    """Add up what the ranks saw, in one exchange and one copy to the host, the step's only wait for the device.

    Tensor-parallel ranks saw the same tokens: one speaks for all. The norm is the same everywhere, and so is whether the update was made.
    """
    watchdog.beat("the step's exchange")
    counted = parts if engine.mesh.tp_rank == 0 else torch.zeros_like(parts)
    message = torch.cat([counted.flatten(), torch.full((1,), float(signal), dtype=torch.float64, device=engine.device)])
    dist.all_reduce(message)
    seen = torch.cat([message, torch.stack([grad_norm.double(), usable.double()])]).cpu()
    return StepReport(by_source=seen[:-3].view_as(parts), grad_norm=float(seen[-2]), signal=int(seen[-3]), applied=bool(seen[-1]))
