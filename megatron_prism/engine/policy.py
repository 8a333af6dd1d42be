"""A policy's log-probabilities of given tokens, and one step of its weights along any function of them, under every layout.

Owns: that both are functions of the sequences alone. The objective is given whole buffers of whole sequences wherever the tokens were computed:
context-parallel ranks lay their log-probabilities together first, so that a ratio of a whole sequence is like any other. What a step reports goes
over all ranks in one exchange, and is read once, before the weights change: a step whose loss or gradient is no number changes nothing.
Knows nothing of rewards, clipping or references. Refuses: what `policy_batches` refuses, and a batch in which nothing is scored.
Legend: t scored tokens of a buffer.
"""

import math
from collections.abc import Callable
from collections.abc import Sequence as Several
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_prism.data_prep.packing import PackingOptions
from megatron_prism.engine import context_parallel, origin
from megatron_prism.engine.loss import LossParts
from megatron_prism.engine.optimizer import set_learning_rate
from megatron_prism.engine.parallel import Mesh
from megatron_prism.engine.policy_batches import Buffers, PolicyBatch, Sequence
from megatron_prism.engine.step import DivergenceError, Engine, evaluating, run_schedule
from megatron_prism.errors import UserError

__all__ = ["Objective", "PolicyReport", "Sequence", "log_probabilities", "policy_step"]

MAXIMUM = "_max"
"""what the name of a metric ends in that is the largest over all tokens; the others are sums"""

Objective = Callable[[Tensor, dict[str, Tensor], Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(log-probabilities [t], the sequences' rows [t] by name, number of each token's sequence [t]) -> (loss of each token [t], metrics [] by name).

t >= 1; all fp32, on the device; gradients go through the first. Sequences come whole. The loss of a step is the plain sum over all tokens of the
batch. Metrics are without gradient, under the same names at every call: sums over the tokens, or the largest where the name ends in "_max".
"""


@dataclass(frozen=True)
class PolicyReport:
    """Of one step, over the whole batch: the loss that was descended, the gradients' norm before clipping, the objective's metrics, scored tokens."""

    loss: float
    grad_norm: float
    sums: dict[str, float]
    tokens: int


def log_probabilities(engine: Engine, sequences: Several[Sequence], options: PackingOptions) -> list[NDArray[np.float32]]:
    """log p of each scored token given those before it, in nats, 0 where a token is not scored: [n] for each sequence, the same on every rank.

    Forward only, without dropout. Called on every rank with the same sequences. Errors: UserError for sequences that the buffers cannot hold.
    """
    if not sequences:
        return []
    buffers = Buffers(sequences, options)

    def loss_of(batch: PolicyBatch) -> Callable[[Tensor], LossParts]:
        def reduce(losses_bs: Tensor) -> LossParts:
            logp_t = scored(losses_bs, batch, engine.mesh)
            return logp_t.sum(), _tokens(0, logp_t), {"logp": logp_t, "numbers": batch.numbers}

        return reduce

    with evaluating(engine):
        reports = _run(engine, buffers, loss_of, forward_only=True)
    found = torch.zeros(buffers.num_scored, dtype=torch.float32, device=engine.device)
    for report in reports if _speaks(engine.mesh) else []:
        found[report["numbers"]] = report["logp"]
    dist.all_reduce(found)  # each token has one value and zeros
    return buffers.split(found.cpu().numpy())


def policy_step(
    engine: Engine, sequences: Several[Sequence], objective: Objective, options: PackingOptions, lr: float, weight_decay: float
) -> PolicyReport:
    """Descend the sum of the objective's losses over all scored tokens of the sequences, by one step of the optimizer.

    Called on every rank with the same sequences. Errors: UserError for sequences that the buffers cannot hold or of which nothing is scored, and for
    dropout; DivergenceError, with all weights as they were, where the loss or the gradients' norm is no number.
    """
    dropout = engine.model[0].config.hidden_dropout
    if dropout:
        raise UserError(f"hidden_dropout={dropout}: a step would see other log-probabilities than the policy wrote with; set hidden_dropout=0")
    if not any(sequence.num_scored for sequence in sequences):
        raise UserError(f"none of the {len(sequences)} sequences of this step has a scored token: there is nothing to descend; leave the step out")
    buffers = Buffers(sequences, options)
    sums, maxima = _metrics(objective, buffers.names, engine.device)
    metrics = [*sums, *maxima]
    for chunk in engine.model:
        chunk.zero_grad_buffer()
    engine.optimizer.zero_grad()

    def run() -> list[dict[str, Tensor]]:
        return _run(engine, buffers, lambda batch: objective_loss(objective, batch, buffers.names, metrics, engine.mesh), forward_only=False)

    reports = run()
    norm = engine.optimizer.gradient_norm()
    grad_norm, loss, *values = _over_all_ranks(engine, reports, len(sums), len(maxima), norm)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise DivergenceError(
            f"policy step: loss {loss}, gradient norm {grad_norm}; the weights are as they were before the step. {_where(engine, buffers, run)}"
        )
    set_learning_rate(engine.optimizer, lr, weight_decay)
    engine.optimizer.apply(norm)
    return PolicyReport(loss, grad_norm, dict(zip(metrics, values, strict=True)), buffers.num_scored)


def _where(engine: Engine, buffers: Buffers, run: Callable[[], list[dict[str, Tensor]]]) -> str:
    """The first tensor of a replay that is no number, and the sequences that it was made of: places in the step's list."""

    def replay() -> Tensor:
        return torch.stack([*(report["seen"].sum() for report in run() if report), torch.zeros((), dtype=torch.float64, device=engine.device)])

    found = origin.find(engine, replay)
    if found.micro_batch is None or found.micro_batch >= buffers.packing.num_buffers:
        return found.describe()
    held = sorted({span.document for span in buffers.packing.spans(found.micro_batch)})
    return f"{found.describe()}; a micro-batch is a buffer, and that one held sequences {', '.join(map(str, held))} of the step"


def scored(losses_bs: Tensor, batch: PolicyBatch, mesh: Mesh) -> Tensor:
    """The losses of a rank's part of a buffer [1, s / cp] -> log-probabilities of the whole buffer's scored tokens [t], with gradients."""
    losses_sb = losses_bs.float().t()
    if mesh.plan.cp > 1:
        losses_sb = context_parallel.gather(losses_sb, batch.packed_seq_params, mesh.groups.cp)
    return -losses_sb[:, 0].index_select(0, batch.places)


def objective_loss(objective: Objective, batch: PolicyBatch, rows: Several[str], metrics: Several[str], mesh: Mesh) -> Callable[[Tensor], LossParts]:
    """What megatron-core calls on the last stage with the losses of a buffer's tokens.

    All cp ranks have the same loss of the whole buffer, and their gradients are summed: each counts a cp-th. The first buffer counts as one token,
    the others as none, so that the gradients, which are divided by all tokens, stay the sum's.
    """
    tokens = int(batch.buffer == 0 and mesh.cp_rank == 0)

    def reduce(losses_bs: Tensor) -> LossParts:
        logp_t = scored(losses_bs, batch, mesh)
        if not len(batch.places):
            return logp_t.sum(), _tokens(tokens, logp_t), {}
        loss_t, found = objective(logp_t, dict(zip(rows, batch.rows, strict=True)), batch.segments)
        assert loss_t.shape == logp_t.shape, f"a loss for each token {list(logp_t.shape)}, not {list(loss_t.shape)}"
        seen = torch.stack([loss_t.detach().double().sum(), *(found[name].detach().double() for name in metrics)])
        return loss_t.sum() / mesh.plan.cp, _tokens(tokens, logp_t), {"seen": seen}

    return reduce


def _tokens(count: int, like: Tensor) -> Tensor:
    return torch.full((), count, dtype=torch.int, device=like.device)


def _run(
    engine: Engine, buffers: Buffers, loss_of: Callable[[PolicyBatch], Callable[[Tensor], LossParts]], forward_only: bool
) -> list[dict[str, Tensor]]:
    mesh = engine.mesh
    assert mesh.plan.micro_batch == 1, f"a packed micro-batch is one buffer, not {mesh.plan.micro_batch}"
    batches = buffers.of_rank(mesh, engine.device)
    count = buffers.num_microbatches(mesh)
    return run_schedule(engine, batches, count, buffers.options.seq_len, loss_of, forward_only, loss_is_masked_sum=False)


def _metrics(objective: Objective, rows: Several[str], device: torch.device) -> tuple[list[str], list[str]]:
    """The names of an objective's sums and of its maxima. Ranks without a scored token, or without the last stage, must know them too: zeros tell."""
    zero_t = torch.zeros(1, device=device)
    with torch.no_grad():
        names = sorted(objective(zero_t, dict.fromkeys(rows, zero_t), zero_t.long())[1])
    return [name for name in names if not name.endswith(MAXIMUM)], [name for name in names if name.endswith(MAXIMUM)]


def _over_all_ranks(engine: Engine, reports: list[dict[str, Tensor]], num_sums: int, num_maxima: int, norm: Tensor) -> list[float]:
    """Gradient norm, loss, sums and maxima over the whole batch, on the host: one exchange and the step's only wait for the device."""
    nothing_k = torch.zeros(1 + num_sums + num_maxima, dtype=torch.float64, device=engine.device)
    nothing_k[1 + num_sums :] = -torch.inf
    own = [report["seen"] for report in reports if report] if _speaks(engine.mesh) else []
    mine_k = _together(torch.stack([nothing_k, *own]), num_maxima)
    all_rk = mine_k.new_empty(dist.get_world_size(), len(mine_k))
    dist.all_gather_into_tensor(all_rk.flatten(), mine_k)
    seen: list[float] = torch.cat([norm.double().view(1), _together(all_rk, num_maxima)]).tolist()
    return seen


def _together(seen_rk: Tensor, num_maxima: int) -> Tensor:
    sums_rk, maxima_rk = seen_rk.tensor_split([seen_rk.shape[1] - num_maxima], dim=1)
    return torch.cat([sums_rk.sum(dim=0), maxima_rk.amax(dim=0)])


def _speaks(mesh: Mesh) -> bool:
    """Tensor- and context-parallel ranks know the same: one speaks for all."""
    return mesh.tp_rank == 0 and mesh.cp_rank == 0
