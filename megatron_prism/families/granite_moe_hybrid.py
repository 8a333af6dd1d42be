"""Granite 4 without experts: dense (every layer attention + MLP) or hybrid (Mamba-2 or attention, each followed by an MLP).

A hybrid's layer of the Hugging Face model is two of megatron-core's: its mixer, then "-". Experts are refused by name.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_prism.errors import UserError
from megatron_prism.families import mamba_config, rope_config
from megatron_prism.families.blocks import EMBEDDING, LAYER, attention, final_norm, mamba, mlp_in, mlp_out, output_layer
from megatron_prism.families.family import Config, Family, layer_kinds, size
from megatron_prism.families.granite import GRANITE
from megatron_prism.families.model_config import MambaConfig
from megatron_prism.families.rules import CopyGateUp

SYMBOLS = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*"}
"""a layer's kind, as published and as transformers 5 writes it -> symbol"""
LAYERS = ("num_hidden_layers", "layer_types", "layers_block_type")
MAMBA = {
    "mamba_n_heads": ("num_heads", 128),
    "mamba_d_state": ("state_dim", 256),
    "mamba_n_groups": ("num_groups", 1),
    "mamba_d_conv": ("conv_kernel", 4),
    "mamba_chunk_size": ("chunk_size", 256),
}
"""config.json key -> MambaConfig field, default"""
_MIXER = (*MAMBA, "mamba_d_head", "mamba_expand", "mamba_conv_bias", "time_step_limit")


def _no_experts(config: Config) -> Mapping[str, Any]:
    experts = config.get("num_local_experts", 8)
    if experts != 0:
        raise UserError(f"num_local_experts={experts!r} is not supported; only 0, a model without experts (left out, transformers takes 8)")
    return {}


def _layers(config: Config) -> Mapping[str, Any]:
    count = size(config, "num_hidden_layers")
    kinds = layer_kinds(config, "layer_types", "layers_block_type") or ["mamba"] * count
    unknown = sorted(set(kinds) - set(SYMBOLS))
    if unknown or len(kinds) != count:
        raise UserError(f"layer_types names {len(kinds)} layers for num_hidden_layers={count}, unknown kinds: {', '.join(unknown) or 'none'}")
    symbols = "".join(SYMBOLS[kind] + "-" for kind in kinds)
    if "M" not in symbols:
        return {"num_layers": count}
    return {"num_layers": 2 * count, "layers_per_block": 2, "hybrid_layer_pattern": symbols, "mamba": _mamba(config)}


def _mamba(config: Config) -> MambaConfig:
    heads, inner = size(config, "mamba_n_heads", 128), size(config, "mamba_expand", 2) * size(config, "hidden_size")
    head_dim = inner // heads if config.get("mamba_d_head") in (None, "auto") else size(config, "mamba_d_head")
    if heads * head_dim != inner:
        raise UserError(f"mamba_n_heads={heads} times mamba_d_head={head_dim} must be mamba_expand times hidden_size, {inner}")
    return mamba_config.block(config, MAMBA, "mamba_conv_bias", head_dim=head_dim, time_step_limit=mamba_config.limits(config))


def _positions(config: Config) -> Mapping[str, Any]:
    kind = config.get("position_embedding_type")
    if kind not in (None, "nope", "rope"):
        raise UserError(f"position_embedding_type={kind!r} is not supported; only 'rope' or 'nope'")
    if kind != "rope":
        return {"position_embedding": "none", "rotary_base": 10_000.0}
    return rope_config.reader(10_000.0)(config)


GRANITE_MOE_HYBRID: Family = replace(
    GRANITE,
    hf_type="granitemoehybrid",
    config={key: name for key, name in GRANITE.config.items() if name not in ("num_layers", "ffn_hidden_size")}
    | {"shared_intermediate_size": "ffn_hidden_size"},
    defaults={**GRANITE.defaults, "shared_intermediate_size": 1024},
    fixed={
        **GRANITE.fixed,
        "mamba_proj_bias": (False,),
        "attention_bias": (False,),
        "normalization_function": ("rmsnorm",),
        "output_router_logits": (False,),
    },
    features={
        ("num_local_experts",): _no_experts,
        (*LAYERS, *_MIXER): _layers,
        (*rope_config.KEYS, "position_embedding_type"): _positions,
    },
    # of the experts that it does not have, and of the initial weights
    ignored=("intermediate_size", "num_experts_per_tok", "router_aux_loss_coef", "init_method", "time_step_min", "time_step_max"),
    weights=(
        EMBEDDING,
        *attention(LAYER + "self_attn.", LAYER + "input_layernorm.weight"),
        *mamba(LAYER + "mamba.", LAYER + "input_layernorm.weight"),
        *mlp_in(LAYER + "shared_mlp.input_linear.", LAYER + "post_attention_layernorm.weight", CopyGateUp),
        *mlp_out(LAYER + "shared_mlp.output_linear."),
        *final_norm("model.norm.weight"),
        *output_layer(EMBEDDING.hf),
    ),
)
