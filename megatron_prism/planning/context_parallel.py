"""What context parallelism asks of a model, a sequence length and a layout, and how TransformerEngine's attention then exchanges keys and values.

Pure arithmetic, no torch. TransformerEngine 2.11 knows a sliding window with a2a and all_gather alone, packed documents with p2p and a2a alone; a2a
gives each rank some of the heads, so it must divide them.
"""

from megatron_prism.config import CommType, ParallelConfig
from megatron_prism.errors import UserError
from megatron_prism.families.model_config import ModelConfig
from megatron_prism.planning.divisors import nearest_divisor

WITH_WINDOW: tuple[CommType, ...] = ("a2a", "all_gather")
WITH_PACKING: tuple[CommType, ...] = ("p2p", "a2a")


def comm_type(model: ModelConfig, parallel: ParallelConfig) -> CommType | None:
    """What the recipe says, or the default: p2p, with a sliding window a2a where it divides the heads, else all_gather; None where cp is 1."""
    if parallel.cp == 1 or parallel.cp_comm_type is not None:
        return parallel.cp_comm_type
    if model.sliding_window is None:
        return "p2p"
    return "all_gather" if _head_rules(model, parallel, parallel.cp) else "a2a"


def rules(model: ModelConfig, parallel: ParallelConfig, seq_len: int) -> list[str]:
    """Each broken rule with its values and a fix."""
    cp = parallel.cp
    if cp == 1:
        given = {name: getattr(parallel, name) for name in ("cp_comm_type", "hierarchical_context_parallel_sizes")}
        said = [f"parallel.{name}={value}" for name, value in given.items() if value is not None]
        return [f"{setting} needs context parallelism: parallel.cp must be at least 2; drop it" for setting in said]
    broken = []
    if seq_len % (2 * cp):
        half, odd = divmod(seq_len, 2)
        other = "" if odd else f"parallel.cp={nearest_divisor(half, cp)} or "
        length = max(seq_len // (2 * cp), 1) * 2 * cp
        broken.append(f"parallel.cp={cp} must cut data.seq_len={seq_len} into 2*cp equal chunks; try {other}data.seq_len={length}")
    return broken + _mamba_rules(model, parallel) + _comm_rules(model, parallel)


def check_packing(kind: CommType | None) -> None:
    """Whether documents that are packed can be exchanged so. Errors: UserError."""
    if kind is not None and kind not in WITH_PACKING:
        raise UserError(
            f"parallel.cp_comm_type={kind} with data.packing: TransformerEngine takes packed documents with {' and '.join(WITH_PACKING)} alone; "
            "use one of these, or layers=local"
        )


def _mamba_rules(model: ModelConfig, parallel: ParallelConfig) -> list[str]:
    """Convolution and scan are cut by heads, B and C with their groups, or shared whole by ranks: nothing between."""
    if model.mamba is None:
        return []
    tp, cp, heads, groups = parallel.tp, parallel.cp, model.mamba.num_heads, model.mamba.num_groups
    cut = f"parallel.tp={tp} * parallel.cp={cp}"
    if heads % (tp * cp):
        return [f"{cut} must divide mamba.num_heads={heads}; try parallel.cp={nearest_divisor(max(heads // tp, 1), cp)}"]
    own = max(groups // tp, 1)
    if own % cp and cp % own:
        fix = nearest_divisor(own, cp)
        return [f"{cut} must divide mamba.num_groups={groups}, or parallel.cp be a multiple of the {own} of a tp rank; try parallel.cp={fix}"]
    return []


def _comm_rules(model: ModelConfig, parallel: ParallelConfig) -> list[str]:
    kind, sizes, cp = parallel.cp_comm_type, parallel.hierarchical_context_parallel_sizes, parallel.cp
    if kind == "a2a+p2p":
        if sizes is None or sizes[0] * sizes[1] != cp:
            given = list(sizes) if sizes else "none"
            return [
                f"parallel.cp_comm_type=a2a+p2p needs parallel.hierarchical_context_parallel_sizes, the ranks of a group times the groups, "
                f"whose product is parallel.cp={cp}, not {given}; try [2, {cp // 2}]"
            ]
    elif sizes is not None:
        return [f"parallel.hierarchical_context_parallel_sizes={list(sizes)} goes with parallel.cp_comm_type=a2a+p2p, not {kind}; drop it"]
    broken = []
    if model.sliding_window is not None and kind is not None and kind not in WITH_WINDOW:
        broken.append(
            f"parallel.cp_comm_type={kind} with a sliding window of {model.sliding_window}: TransformerEngine takes windows with "
            f"{' and '.join(WITH_WINDOW)} alone; use one of these"
        )
    if kind in ("a2a", "a2a+p2p"):
        broken += _head_rules(model, parallel, sizes[0] if sizes else cp)
    return broken


def _head_rules(model: ModelConfig, parallel: ParallelConfig, ranks: int) -> list[str]:
    """Of an exchange of heads for tokens among so many ranks."""
    sizes = {name: getattr(model, name) for name in ("num_attention_heads", "num_query_groups")}
    other = "p2p" if model.sliding_window is None else "all_gather"
    return [
        f"parallel.cp_comm_type={parallel.cp_comm_type}: parallel.tp={parallel.tp} times its {ranks} ranks must divide {name}={size}; "
        f"try parallel.cp_comm_type={other}"
        for name, size in sizes.items()
        if size % (parallel.tp * ranks)
    ]
