"""The parallel plan: how ranks, layers, heads and sequences are cut, checked once and trusted afterwards.

Pure arithmetic on a ModelConfig; no torch, so that `--dry-run` and every error answer at once.
"""

from dataclasses import dataclass

from megatron_prism.config import ParallelConfig
from megatron_prism.errors import UserError
from megatron_prism.families.model_config import ModelConfig


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
    """vocabulary rows stored while training: the model's own, padded up to a multiple of tp"""

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def num_chunks(self) -> int:
        """Model chunks that each rank holds: 1, or vpp of them."""
        return self.vpp or 1

    def describe(self) -> str:
        """One line for people."""
        virtual = f" vpp={self.vpp}" if self.vpp else ""
        sequence = " sp" if self.sp else ""
        return f"{self.world_size} ranks: tp={self.tp}{sequence} pp={self.pp}{virtual} cp={self.cp} dp={self.dp}"


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
        padded_vocab_size=-(-model.vocab_size // parallel.tp) * parallel.tp,
    )


def _model_rules(model: ModelConfig, parallel: ParallelConfig, seq_len: int) -> list[str]:
    broken = []
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        size = getattr(model, name)
        if size % parallel.tp:
            broken.append(f"parallel.tp={parallel.tp} must divide {name}={size}; try parallel.tp={_nearest_divisor(size, parallel.tp)}")
    chunks = parallel.pp * (parallel.vpp or 1)
    if model.num_layers % chunks:
        cut = f"parallel.pp={parallel.pp}" + (f" * parallel.vpp={parallel.vpp}" if parallel.vpp else "")
        broken.append(f"{cut} must divide num_layers={model.num_layers}; try parallel.pp={_nearest_divisor(model.num_layers, parallel.pp)}")
    if parallel.vpp and parallel.pp == 1:
        broken.append(f"parallel.vpp={parallel.vpp} needs a pipeline: parallel.pp must be at least 2; drop parallel.vpp")
    if parallel.sp and parallel.tp == 1:
        broken.append("parallel.sp=true needs tensor parallelism: parallel.tp must be at least 2; drop parallel.sp")
    if parallel.sp and seq_len % (parallel.tp * parallel.cp):
        broken.append(
            f"parallel.tp={parallel.tp} * parallel.cp={parallel.cp} must divide data.seq_len={seq_len} with parallel.sp=true; pad data.seq_len"
        )
    if parallel.cp > 1:
        broken.append(f"parallel.cp={parallel.cp}: context parallelism is not implemented yet; use parallel.cp=1")
    return broken


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


def _nearest_divisor(size: int, wanted: int) -> int:
    return min((divisor for divisor in range(1, size + 1) if size % divisor == 0), key=lambda divisor: (abs(divisor - wanted), -divisor))
