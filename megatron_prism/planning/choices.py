"""Which layouts a model can train under on so many GPUs, what each needs and takes, which of them to take, and why the others not.

Enumerated are tp of 1, 2, 4 and 8 (within a node of 8, always with sp), every pp that divides the GPUs, with a virtual pipeline where the model
allows one, and cp by powers of two; dp is the rest. Each with nothing recomputed, with all layers, and for long sequences with all but attention's
core. What a rule forbids is kept with the rule; what is allowed is ordered by the predicted time of a step (`step_time`) for each sequence.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product

from megatron_prism.config import ParallelConfig
from megatron_prism.errors import UserError
from megatron_prism.families.model_config import ModelConfig
from megatron_prism.planning.divisors import divisors
from megatron_prism.planning.layout import ParallelPlan, make_plan
from megatron_prism.planning.memory import MARGIN, MemoryPlan, memory
from megatron_prism.planning.step_time import GPUS_PER_NODE, Machine, StepTime, step_time
from megatron_prism.planning.training import Training

SHORTEST_CHUNK = 8192
"""tokens of each of the 2 * cp chunks, at least: shorter ones were never measured"""
LONG = 32768
"""tokens of a sequence from which on attention's core is work enough to keep its output where layers run again"""
VIRTUAL = (2, 4)
"""chunks of each pipeline stage that are tried"""
TOKENS_PER_STEP = 1_048_576
"""PRISM's mid-training (Table 16): 128 sequences of 8,192"""


@dataclass(frozen=True)
class Task:
    """What is to be laid out."""

    model: ModelConfig
    gpus: int
    seq_len: int
    global_batch: int | None = None
    """sequences of a step; None: `tokens_per_step`, rounded up to what dp divides"""
    tokens_per_step: int = TOKENS_PER_STEP
    micro_batch: int = 1
    training: Training = field(default_factory=Training)
    """types of weights, gradients and states; its recomputation is what is chosen here"""
    machine: Machine = field(default_factory=Machine)
    check: Callable[[ParallelPlan, ParallelConfig, Training], None] | None = None
    """what else may forbid a layout. Errors: UserError"""
    undone: Mapping[str, str] = field(default_factory=dict)
    """a recipe's own keys of layout that no choice here has, with what turns them off"""

    def choice(self, plan: ParallelPlan, training: Training, tp_comm_overlap: bool = False) -> "Choice":
        """One layout's memory and time."""
        need = memory(self.model, plan, self.seq_len, training)
        step = step_time(self.model, plan, self.seq_len, training, self.machine, tp_comm_overlap)
        return Choice(plan, training, need, step, tp_comm_overlap)


@dataclass(frozen=True)
class Choice:
    """A layout with a kind of recomputation."""

    plan: ParallelPlan
    training: Training
    need: MemoryPlan
    step: StepTime
    tp_comm_overlap: bool = False

    @property
    def recompute(self) -> str | None:
        """What runs again."""
        return self.training.recompute

    @property
    def keep_attention(self) -> bool:
        """Whether attention's core does not."""
        return self.training.keep_attention

    @property
    def overrides(self) -> str:
        """What sets it on the command line of `prism train`."""
        plan, training = self.plan, self.training
        settings = {"parallel.tp": plan.tp, "parallel.sp": str(plan.sp).lower(), "parallel.pp": plan.pp, "parallel.cp": plan.cp}
        settings |= {"parallel.vpp": plan.vpp} if plan.vpp else {}
        options = "".join(f" {name}=true" for name in ("keep_attention", "offload_activations") if getattr(training, name))
        return " ".join(f"{key}={value}" for key, value in settings.items()) + f" recompute={self.recompute or 'none'}{options}"

    @property
    def global_batch(self) -> int:
        """Sequences of a step."""
        return self.plan.num_microbatches * self.plan.dp * self.plan.micro_batch

    @property
    def pace(self) -> float:
        """Seconds of a sequence of the global batch, which need not be one for all layouts of a model."""
        return self.step.total / self.global_batch

    def tokens_per_second(self, seq_len: int) -> float:
        """Of one GPU."""
        return self.global_batch * seq_len / self.step.total / self.plan.world_size

    @property
    def reason(self) -> str:
        """Why this one, in words."""
        ranks = self.plan.tp * self.plan.pp * self.plan.cp
        cut = f"{ranks} ranks share a copy of the model" if ranks > 1 else "every rank has a copy of the model"
        again = "every layer, but for attention's core," if self.keep_attention else "every layer" if self.recompute else "nothing"
        host = ", what layers keep waits in host memory" if self.training.offload_activations else ""
        return f"the quickest that fits: {cut}, {again} is computed twice{host}"


@dataclass(frozen=True)
class Refusal:
    """A layout that a rule forbids."""

    parallel: ParallelConfig
    recompute: str | None
    """of a layout that is forbidden with this recomputation alone"""
    rule: str


@dataclass(frozen=True)
class Survey:
    """Every layout: the allowed ones, the quickest first, and the others with their rules."""

    allowed: list[Choice]
    refused: list[Refusal]


def survey(task: Task) -> Survey:
    """Every layout of a task."""
    given = replace(task.training, recompute=None, recompute_layers=None, keep_attention=False, offload_activations=False)
    full = replace(given, recompute="full")
    kinds = [given, full, *([replace(full, keep_attention=True)] if task.seq_len >= LONG else [])]
    allowed: list[Choice] = []
    refused: list[Refusal] = []
    for parallel in _layouts(task):
        try:
            plan = _plan(task, parallel)
        except UserError as error:
            refused += [Refusal(parallel, None, str(error).splitlines()[0])] if parallel.vpp is None else []
            continue
        for kind in kinds:
            try:
                if task.check is not None:
                    task.check(plan, parallel, kind)
                allowed.append(task.choice(plan, kind))
            except UserError as error:
                refused.append(Refusal(parallel, kind.recompute, " ".join(str(error).split())))
    return Survey(sorted(allowed, key=_order), refused)


def offloaded(task: Task, found: Survey) -> list[Choice]:
    """The layouts with what layers keep in host memory, whose room is not checked: for when nothing else fits."""
    again = [choice for choice in found.allowed if choice.recompute == "full"]
    moved = [(choice.plan, replace(choice.training, offload_activations=True)) for choice in again]
    return sorted((task.choice(plan, training) for plan, training in moved), key=_order)


def choices(model: ModelConfig, gpus: int, seq_len: int, tokens_per_step: int = TOKENS_PER_STEP, training: Training | None = None) -> list[Choice]:
    """Every layout that the model allows (micro-batches of one sequence, stages of equal length), the quickest on H200s first."""
    return survey(Task(model, gpus, seq_len, tokens_per_step=tokens_per_step, training=training or Training())).allowed


def recommended(found: list[Choice], memory_gib: float) -> Choice | None:
    """The quickest choice that fits with `MARGIN` to spare, a pipeline only where nothing else fits: their time was never measured. None: nothing."""
    fitting = [choice for choice in found if choice.need.fits(memory_gib)]
    return next((choice for choice in fitting if choice.plan.pp == 1), fitting[0] if fitting else None)


def verdict(need: MemoryPlan, memory_gib: float) -> str:
    """Whether it fits, in words and figures."""
    gib, limit = need.total / 2**30, (1 - MARGIN) * memory_gib
    rule = f"{gib:.1f} GiB of {memory_gib:g} GiB, of which {limit:.1f} may be planned"
    return f"fits: {rule}" if need.fits(memory_gib) else f"does not fit: {rule}"


def _order(choice: Choice) -> tuple[float, int]:
    return choice.pace, choice.plan.tp * choice.plan.pp * choice.plan.cp


def _layouts(task: Task) -> Iterator[ParallelConfig]:
    """Cuts whose ranks divide the GPUs, with chunks of context parallelism that are worth it."""
    longest_cut = max(task.seq_len // (2 * SHORTEST_CHUNK), 1)
    cuts = product((1, 2, 4, GPUS_PER_NODE), divisors(task.gpus), (2**power for power in range(longest_cut.bit_length())))
    for tp, pp, cp in cuts:
        if task.gpus % (tp * pp * cp) or pp > task.model.num_layers:
            continue
        sp = tp > 1 and task.seq_len % (tp * cp) == 0
        virtual = VIRTUAL if pp > 1 and not task.model.is_hybrid else ()
        for vpp in (None, *virtual):
            yield ParallelConfig(tp=tp, sp=sp, pp=pp, vpp=vpp, cp=cp)


def _plan(task: Task, parallel: ParallelConfig) -> ParallelPlan:
    dp = task.gpus // parallel.model_ranks
    batch = task.global_batch or -(-task.tokens_per_step // (task.seq_len * dp)) * dp
    return make_plan(task.model, parallel, task.gpus, task.seq_len, batch, task.micro_batch)
