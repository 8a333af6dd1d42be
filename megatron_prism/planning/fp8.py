"""Whether a model's matrix products can run in FP8 under a plan. Refuses impossible shapes by name, before anything is built.

cuBLAS multiplies FP8 matrices whose inner sizes are multiples of 16 (TransformerEngine checks them, in the middle of the first step). All three
products of a linear layer run in FP8, so its inputs, its outputs and the tokens of a rank are each the inner size of one.
"""

from megatron_prism.config import Fp8Config
from megatron_prism.errors import UserError
from megatron_prism.families.model_config import ModelConfig
from megatron_prism.planning.layout import ParallelPlan

MULTIPLE = 16


def check_fp8(model: ModelConfig, plan: ParallelPlan, seq_len: int, fp8: Fp8Config) -> None:
    """Errors: UserError naming every size that is no multiple of 16, and layer counts that exceed the model."""
    sizes = {f"{name} of this rank": size for name, size in linear_sizes(model, plan.tp).items()}
    tokens = seq_len * plan.micro_batch // plan.cp
    sizes["tokens of a micro-batch on a rank (seq_len * micro_batch / cp)"] = tokens
    if plan.sp:
        sizes["tokens of a micro-batch on a sequence-parallel rank"] = tokens // plan.tp
    wrong = [f"{name} = {size}" for name, size in sizes.items() if size % MULTIPLE]
    if wrong:
        raise UserError(
            f"fp8 needs sizes that are multiples of {MULTIPLE}; with tp={plan.tp} these are not:\n  "
            + "\n  ".join(wrong)
            + "\nlower tp, or set fp8=none"
        )
    kept = fp8.bf16_layers_at_start + fp8.bf16_layers_at_end
    if kept >= model.num_layers:
        raise UserError(
            f"fp8.bf16_layers_at_start + bf16_layers_at_end = {kept} leave none of {model.num_layers} layers in FP8; lower them, or set fp8=none"
        )


def linear_sizes(model: ModelConfig, tp: int) -> dict[str, int]:
    """Inputs and outputs of one rank's linear layers, by name."""
    sizes = {"hidden_size": model.hidden_size}
    symbols = set("".join(model.layer_symbols))
    if "*" in symbols:
        sizes |= {"query, key and value rows": (model.query_size + 2 * model.kv_size) // tp, "attention output columns": model.query_size // tp}
    if "-" in symbols:
        sizes |= {"ffn_hidden_size": model.ffn_hidden_size // tp}
    if "M" in symbols:
        mamba = model.mamba
        assert mamba is not None
        shared = mamba.num_groups % tp != 0
        own = 2 * mamba.d_inner // tp + mamba.num_heads // tp + (0 if shared else mamba.bc_size // tp)
        sizes |= {"Mamba in_proj rows": own, "Mamba d_inner": mamba.d_inner // tp}
        if shared:
            sizes |= {"Mamba B and C rows": mamba.bc_size}
    return sizes
