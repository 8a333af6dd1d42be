"""The parallel plan: how ranks, layers, heads and sequences are cut, checked once and trusted afterwards.

Pure arithmetic on a ModelConfig; no torch, so that `--dry-run` and every error answer at once.
"""

from dataclasses import dataclass

from megatron_prism.config import CommType, ParallelConfig
from megatron_prism.errors import UserError
from megatron_prism.families.model_config import ModelConfig
from megatron_prism.planning import context_parallel
from megatron_prism.planning.divisors import nearest_divisor

VOCABULARY_UNIT = 16
"""A rank holds a multiple of so many vocabulary rows: products over Granite 3.3's 49,159 take over twice as long as those over 49,168."""


@dataclass(frozen=True)
class ParallelPlan:
    """A mesh of tp * cp * dp * pp ranks for one model, one global batch and one sequence length; every divisibility rule holds."""

    tp: int
    pp: int
    vpp: int | None
    cp: int
    dp: int
    sp: bool
    micro_batch: int
    num_microbatches: int
    """micro-batches that each data-parallel rank runs in one step"""
    padded_vocab_size: int
    """vocabulary rows held while training: the model's own, padded up to a multiple of tp * VOCABULARY_UNIT"""
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None
    cp_comm_type: CommType | None = None
    """what TransformerEngine's attention exchanges; ours gathers"""
    hierarchical_context_parallel_sizes: tuple[int, int] | None = None

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def num_chunks(self) -> int:
        """Model chunks that each rank holds: 1, or vpp of them."""
        return self.vpp or 1

    def stage_layers(self, num_layers: int) -> tuple[tuple[int, ...], ...]:
        """The megatron-core layers (from 0) that each pipeline stage holds; with vpp a stage's chunks are one round of all stages apart."""
        if self.vpp:
            size = num_layers // (self.pp * self.vpp)
            firsts = [[(chunk * self.pp + stage) * size for chunk in range(self.vpp)] for stage in range(self.pp)]
            return tuple(tuple(first + layer for first in starts for layer in range(size)) for starts in firsts)
        sizes = _stage_sizes(num_layers, self.pp, self.num_layers_in_first_pipeline_stage, self.num_layers_in_last_pipeline_stage)
        starts = [sum(sizes[:stage]) for stage in range(self.pp)]
        return tuple(tuple(range(start, start + size)) for start, size in zip(starts, sizes, strict=True))

    def describe(self) -> str:
        """One line for people."""
        virtual = f" vpp={self.vpp}" if self.vpp else ""
        sequence = " sp" if self.sp else ""
        ends = {"first": self.num_layers_in_first_pipeline_stage, "last": self.num_layers_in_last_pipeline_stage}
        uneven = ", ".join(f"{count} layers in the {end} stage" for end, count in ends.items() if count)
        return f"{self.world_size} ranks: tp={self.tp}{sequence} pp={self.pp}{virtual} cp={self.cp} dp={self.dp}" + (f" ({uneven})" if uneven else "")


def make_plan(model: ModelConfig, parallel: ParallelConfig, world_size: int, seq_len: int, global_batch: int, micro_batch: int) -> ParallelPlan:
    """Check every rule that ties the layout to the model, the batch and the world size.

    seq_len in tokens, global_batch and micro_batch in sequences. Errors: one UserError that lists each broken rule with its values and a fix.
    """
    broken = [*_model_rules(model, parallel, seq_len), *_batch_rules(parallel, world_size, global_batch, micro_batch)]
    if broken:
        raise UserError("\n".join(broken))
    dp = world_size // parallel.model_ranks
    return ParallelPlan(
        tp=parallel.tp,
        pp=parallel.pp,
        vpp=parallel.vpp,
        cp=parallel.cp,
        dp=dp,
        sp=parallel.sp,
        micro_batch=micro_batch,
        num_microbatches=global_batch // (dp * micro_batch),
        padded_vocab_size=_rounded_up(model.vocab_size, parallel.tp * VOCABULARY_UNIT),
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        cp_comm_type=context_parallel.comm_type(model, parallel),
        hierarchical_context_parallel_sizes=parallel.hierarchical_context_parallel_sizes,
    )


def _model_rules(model: ModelConfig, parallel: ParallelConfig, seq_len: int) -> list[str]:
    broken = [*_tensor_rules(model, parallel.tp), *_mamba_rules(model, parallel.tp), *_pipeline_rules(model, parallel)]
    broken += context_parallel.rules(model, parallel, seq_len)
    if parallel.sp and parallel.tp == 1:
        broken.append("parallel.sp=true needs tensor parallelism: parallel.tp must be at least 2; drop parallel.sp")
    if parallel.sp and seq_len % (parallel.tp * parallel.cp):
        broken.append(
            f"parallel.tp={parallel.tp} * parallel.cp={parallel.cp} must divide data.seq_len={seq_len} with parallel.sp=true; pad data.seq_len"
        )
    return broken


def _tensor_rules(model: ModelConfig, tp: int) -> list[str]:
    sizes = {name: getattr(model, name) for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size")}
    if model.mamba is not None:
        sizes["mamba.num_heads"] = model.mamba.num_heads
    return [f"parallel.tp={tp} must divide {name}={size}; try parallel.tp={nearest_divisor(size, tp)}" for name, size in sizes.items() if size % tp]


def _mamba_rules(model: ModelConfig, tp: int) -> list[str]:
    """Groups of heads (and of the gated norm) are cut whole over the ranks, or shared whole by ranks: nothing between."""
    if model.mamba is None:
        return []
    sizes = {"mamba.num_groups": model.mamba.num_groups, "mamba.norm_groups": model.mamba.norm_groups}
    return [
        f"parallel.tp={tp} must divide {name}={size} or be a multiple of it; try parallel.tp={nearest_divisor(size, tp)}"
        for name, size in sizes.items()
        if size % tp and tp % size
    ]


def _pipeline_rules(model: ModelConfig, parallel: ParallelConfig) -> list[str]:
    broken = []
    if parallel.vpp and parallel.pp == 1:
        broken.append(f"parallel.vpp={parallel.vpp} needs a pipeline: parallel.pp must be at least 2; drop parallel.vpp")
    if parallel.vpp and model.is_hybrid:
        broken.append(f"parallel.vpp={parallel.vpp}: megatron-core's hybrid models have no virtual pipeline; drop parallel.vpp")
    if parallel.num_layers_in_first_pipeline_stage or parallel.num_layers_in_last_pipeline_stage:
        return broken + _uneven_rules(model.num_layers, parallel)
    chunks = parallel.pp * (parallel.vpp or 1)
    if model.num_layers % chunks:
        cut = f"parallel.pp={parallel.pp}" + (f" * parallel.vpp={parallel.vpp}" if parallel.vpp else "")
        broken.append(
            f"{cut} must divide num_layers={model.num_layers}; try parallel.pp={nearest_divisor(model.num_layers, parallel.pp)}"
            + _uneven_suggestion(model.num_layers, parallel)
        )
    return broken


def _uneven_suggestion(num_layers: int, parallel: ParallelConfig) -> str:
    """The layers of a shorter last stage that would make pp work, where there are any."""
    pp = parallel.pp
    last = num_layers - -(-num_layers // pp) * (pp - 1)
    if parallel.vpp or pp == 1 or last < 1:
        return ""
    return f", or give the ends numbers of their own: parallel.num_layers_in_last_pipeline_stage={last}"


def _uneven_rules(num_layers: int, parallel: ParallelConfig) -> list[str]:
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    given = {"num_layers_in_first_pipeline_stage": first, "num_layers_in_last_pipeline_stage": last}
    said = " and ".join(f"parallel.{name}={count}" for name, count in given.items() if count)
    if parallel.pp == 1:
        return [f"{said} needs a pipeline: parallel.pp must be at least 2; drop it"]
    if parallel.vpp:
        return [f"{said} does not go with parallel.vpp={parallel.vpp}; drop one of them"]
    rest = num_layers - (first or 0) - (last or 0)
    stages = parallel.pp - sum(1 for count in given.values() if count)
    even = rest == 0 if stages == 0 else rest > 0 and rest % stages == 0
    if even:
        return []
    left = f"{rest} of num_layers={num_layers} for the other {stages} stage{'' if stages == 1 else 's'} of parallel.pp={parallel.pp}"
    return [f"{said} leaves {left}; the rest must divide evenly" + (", at least one layer each" if rest <= 0 < stages else "")]


def _stage_sizes(num_layers: int, pp: int, first: int | None, last: int | None) -> tuple[int, ...]:
    middle = pp - (first is not None) - (last is not None)
    rest = num_layers - (first or 0) - (last or 0)
    sizes = [rest // middle] * middle if middle else []
    return (*([first] if first is not None else []), *sizes, *([last] if last is not None else []))


def _batch_rules(parallel: ParallelConfig, world_size: int, global_batch: int, micro_batch: int) -> list[str]:
    ranks = parallel.model_ranks
    if world_size % ranks:
        wanted = -(-world_size // ranks) * ranks
        return [f"parallel.tp*pp*cp={ranks} must divide the {world_size} ranks of this launch; start {wanted} ranks or change parallel"]
    dp = world_size // ranks
    if global_batch % (dp * micro_batch):
        return [
            f"global_batch={global_batch} must be a multiple of dp={dp} * micro_batch={micro_batch}; "
            f"try global_batch={-(-global_batch // (dp * micro_batch)) * dp * micro_batch}"
        ]
    microbatches = global_batch // (dp * micro_batch)
    if parallel.vpp and microbatches % parallel.pp:
        return [
            f"with parallel.vpp={parallel.vpp}, the micro-batches of a step ({microbatches}) must be a multiple of parallel.pp={parallel.pp}; "
            f"try global_batch={-(-microbatches // parallel.pp) * parallel.pp * dp * micro_batch}"
        ]
    return []


def _rounded_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
