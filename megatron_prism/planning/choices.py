"""Which layouts a model can train under on so many GPUs, what each needs, and which to take.

The order of preference is a rough time of a step, relative to data parallelism alone: each doubling of cp costs `CP_DOUBLING`, of tp `TP_DOUBLING`,
of pp `PP_DOUBLING`, recomputation the FLOPs that it adds. So data parallelism comes first, then, for long sequences, context parallelism, then a
little tensor parallelism (which cuts activations too), then full recomputation (a third more work), then more tensor parallelism; a pipeline last.
tp stays within a node of 8, always with sp; cp leaves chunks of `SHORTEST_CHUNK`.
"""

from dataclasses import dataclass, replace
from itertools import product
from math import log2

from megatron_prism.config import ParallelConfig
from megatron_prism.errors import UserError
from megatron_prism.families.model_config import ModelConfig
from megatron_prism.planning.divisors import divisors
from megatron_prism.planning.flops import flops_per_token, recompute_flops_per_token
from megatron_prism.planning.layout import ParallelPlan, make_plan
from megatron_prism.planning.memory import MARGIN, MemoryPlan, memory
from megatron_prism.planning.training import Training

GPUS_PER_NODE = 8
TP_DOUBLING = 1.17
"""measured: 512 TFLOP/s on one H200 became 438 on each of two with tp=2 and sp (8 of LLaMA-3.1-8B's layers, 8,192 tokens)"""
CP_DOUBLING = 1.05
"""not measured: a choice that cuts long sequences before matrices, since a ring's exchange runs beside attention"""
SHORTEST_CHUNK = 8192
"""tokens of each of the 2 * cp chunks, at least: of shorter ones attention takes less time than their exchange (a choice, not measured)"""
PP_DOUBLING = 1.2
"""not measured: a choice that takes a pipeline after the same tensor parallelism"""
LONG = 32768
"""tokens of a sequence from which on attention's core is work enough to keep its output where layers run again"""
TOKENS_PER_STEP = 1_048_576
"""PRISM's mid-training (Table 16): 128 sequences of 8,192"""


@dataclass(frozen=True)
class Choice:
    """A layout with a kind of recomputation."""

    plan: ParallelPlan
    recompute: str | None
    need: MemoryPlan
    relative_time: float
    """rough time of a step, data parallelism alone being 1"""
    keep_attention: bool = False

    @property
    def overrides(self) -> str:
        """What sets it on the command line of `prism train`."""
        plan = self.plan
        settings = {"parallel.tp": plan.tp, "parallel.sp": str(plan.sp).lower(), "parallel.pp": plan.pp, "parallel.cp": plan.cp}
        kept = " keep_attention=true" if self.keep_attention else ""
        return " ".join(f"{key}={value}" for key, value in settings.items()) + f" recompute={self.recompute or 'none'}{kept}"

    @property
    def global_batch(self) -> int:
        """Sequences of a step: as many as the tokens asked for need, rounded up to what dp divides."""
        return self.plan.num_microbatches * self.plan.dp * self.plan.micro_batch

    @property
    def reason(self) -> str:
        """Why this one, in words."""
        ranks = self.plan.tp * self.plan.pp * self.plan.cp
        cut = f"{ranks} ranks share a copy of the model" if ranks > 1 else "every rank has a copy of the model"
        again = "every layer, but for attention's core," if self.keep_attention else "every layer" if self.recompute else "nothing"
        return f"the quickest that fits: {cut}, {again} is computed twice"


def choices(model: ModelConfig, gpus: int, seq_len: int, tokens_per_step: int = TOKENS_PER_STEP, training: Training | None = None) -> list[Choice]:
    """Every layout that the model allows (micro-batches of one sequence, stages of equal length), the quickest first.

    training: the types of weights, gradients and states (a bf16 recipe's defaults); its recomputation is what is chosen here.
    """
    given = training or Training()
    given = replace(given, recompute=None, recompute_layers=None, keep_attention=False, offload_activations=False)
    full = replace(given, recompute="full")
    kinds = [given, full, *([replace(full, keep_attention=True)] if seq_len >= LONG else [])]
    found = [
        Choice(plan, kind.recompute, memory(model, plan, seq_len, kind), _relative_time(model, plan, seq_len, kind), kind.keep_attention)
        for plan in _plans(model, gpus, seq_len, tokens_per_step)
        for kind in kinds
    ]
    return sorted(found, key=lambda choice: choice.relative_time)


def recommended(found: list[Choice], memory_gib: float) -> Choice | None:
    """The quickest choice that fits with `MARGIN` to spare; None: nothing fits."""
    return next((choice for choice in found if choice.need.fits(memory_gib)), None)


def verdict(need: MemoryPlan, memory_gib: float) -> str:
    """Whether it fits, in words and figures."""
    gib, limit = need.total / 2**30, (1 - MARGIN) * memory_gib
    rule = f"{gib:.1f} GiB of {memory_gib:g} GiB, of which {limit:.1f} may be planned"
    return f"fits: {rule}" if need.fits(memory_gib) else f"does not fit: {rule}"


def _plans(model: ModelConfig, gpus: int, seq_len: int, tokens_per_step: int) -> list[ParallelPlan]:
    found = []
    longest_cut = max(seq_len // (2 * SHORTEST_CHUNK), 1)
    cuts = product((1, 2, 4, 8), divisors(model.num_layers), (2**power for power in range(longest_cut.bit_length())))
    for tp, pp, cp in cuts:
        ranks = tp * pp * cp
        if gpus % ranks:
            continue
        dp = gpus // ranks
        batch = -(-tokens_per_step // (seq_len * dp)) * dp
        sp = tp > 1 and seq_len % (tp * cp) == 0
        try:
            found.append(make_plan(model, ParallelConfig(tp=tp, sp=sp, pp=pp, cp=cp), gpus, seq_len, batch, 1))
        except UserError:  # the model does not allow it
            continue
    return found


def _relative_time(model: ModelConfig, plan: ParallelPlan, seq_len: int, kind: Training) -> float:
    extra = recompute_flops_per_token(model, seq_len, kind.recompute, keep_attention=kind.keep_attention) / flops_per_token(model, seq_len)
    return (1 + extra) * CP_DOUBLING ** log2(plan.cp) * TP_DOUBLING ** log2(plan.tp) * PP_DOUBLING ** log2(plan.pp)
