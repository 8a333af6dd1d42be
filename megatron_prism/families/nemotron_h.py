"""Nemotron-H without experts: one mixer a layer (Mamba-2, attention without positions, or a squared-ReLU MLP without gate), one norm, one residual.

Weights are named `backbone.*` both in the published files and in those that transformers 5 writes.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_prism.errors import UserError
from megatron_prism.families import mamba_config
from megatron_prism.families.blocks import EMBEDDING, attention, final_norm, mamba, mlp_out, output_layer
from megatron_prism.families.family import Config, Family, kv_heads, layer_kinds, size
from megatron_prism.families.rules import Copy

SYMBOLS = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "mlp": "-"}
LAYERS = ("hybrid_override_pattern", "layers_block_type", "layer_types", "num_hidden_layers")
MAMBA = {
    "mamba_num_heads": ("num_heads", 128),
    "mamba_head_dim": ("head_dim", 64),
    "ssm_state_size": ("state_dim", 128),
    "n_groups": ("num_groups", 8),
    "conv_kernel": ("conv_kernel", 4),
    "chunk_size": ("chunk_size", 128),
}
"""config.json key -> MambaConfig field, default"""
ALIASES = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_chunk_size": "chunk_size",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_dt_min": "time_step_min",
}
"""older key, which transformers prefers (and no published model has) -> the key that is read here"""
_LAYER, _EMBEDDING = "backbone.layers.{i}.", replace(EMBEDDING, hf="backbone.embeddings.weight")
_MIXER, _NORM, _FC1 = _LAYER + "mixer.", _LAYER + "norm.weight", "decoder.layers.mlp.linear_fc1."


def _layers(config: Config) -> Mapping[str, Any]:
    kinds = layer_kinds(config, "layers_block_type", "layer_types")
    pattern = config.get("hybrid_override_pattern") or "" if kinds is None else "".join(SYMBOLS.get(kind, "E") for kind in kinds)
    if not pattern or set(pattern) - set("M*-"):
        raise UserError(
            f"hybrid_override_pattern or layers_block_type={kinds or pattern!r} is not supported for nemotron_h; "
            "only M (mamba), * (attention) and - (mlp), no experts"
        )
    count = config.get("num_hidden_layers")
    if count not in (None, len(pattern)):
        raise UserError(f"num_hidden_layers={count} differs from the {len(pattern)} layers of hybrid_override_pattern {pattern}")
    return {
        "num_layers": len(pattern),
        "hybrid_layer_pattern": pattern,
        "activation": "squared_relu",
        "position_embedding": "none",
        "rotary_base": 10_000.0,
    }


def _mamba(config: Config) -> Mapping[str, Any]:
    for old, key in ALIASES.items():
        if old in config:
            raise UserError(f"{old}={config[old]!r} is an older name of {key}; rename it in config.json")
    if mamba_config.limits(config) != mamba_config.NO_LIMIT:
        raise UserError(f"time_step_limit={config['time_step_limit']!r} is not supported for nemotron_h: its limits are time_step_min and infinity")
    low = 0.001 if config.get("time_step_min") is None else config["time_step_min"]
    # what transformers computes with; it reads neither time_step_limit nor time_step_max here
    limit = mamba_config.limits({"time_step_min": [low, float("inf")]}, "time_step_min")
    return {"mamba": mamba_config.block(config, MAMBA, "use_conv_bias", time_step_limit=limit)}


def _head_dim(config: Config) -> Mapping[str, Any]:
    dim = size(config, "head_dim", 128)
    if config.get("attention_head_dim") not in (None, dim):
        raise UserError(f"attention_head_dim={config['attention_head_dim']} differs from head_dim={dim}, which transformers uses (default 128)")
    return {"kv_channels": dim}


_OFF = "attention_bias mlp_bias use_bias mamba_proj_bias tie_word_embeddings".split()
NEMOTRON_H = Family(
    hf_type="nemotron_h",
    config={
        "hidden_size": "hidden_size",
        "intermediate_size": "ffn_hidden_size",
        "num_attention_heads": "num_attention_heads",
        "num_key_value_heads": "num_query_groups",
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_position_embeddings",
        "layer_norm_epsilon": "layernorm_epsilon",
        "initializer_range": "init_method_std",
    },
    defaults={
        "hidden_size": 4096,
        "intermediate_size": 21_504,
        "num_attention_heads": 32,
        "num_key_value_heads": kv_heads(8),
        "vocab_size": 131_072,
        "max_position_embeddings": 4096,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
    },
    fixed={
        "mlp_hidden_act": ("relu2",),
        "mamba_hidden_act": ("silu", "swish"),
        "attention_dropout": (0, 0.0),
        "hidden_dropout": (0, 0.0),
        "num_nextn_predict_layers": (0,),
        **dict.fromkeys(_OFF, (False,)),
    },
    features={
        LAYERS: _layers,
        (*MAMBA, *ALIASES, "use_conv_bias", "time_step_min", "time_step_limit"): _mamba,
        ("head_dim", "attention_head_dim"): _head_dim,
    },
    ignored=tuple(
        # of the experts that no layer has, of the initial weights, of kernels and caches; rms_norm_eps: layer_norm_epsilon is the one that is read
        "n_routed_experts n_shared_experts moe_intermediate_size moe_shared_expert_intermediate_size moe_latent_size moe_shared_expert_overlap "
        "num_experts_per_tok routed_scaling_factor n_group topk_group norm_topk_prob mtp_layers_block_type mtp_hybrid_override_pattern "
        "rescale_prenorm_residual time_step_max time_step_floor time_step_rank expand residual_in_fp32 num_logits_to_keep use_mamba_kernels "
        "mamba_ssm_cache_dtype auto_map num_query_groups rms_norm_eps hidden_act".split()
    ),
    weights=(
        _EMBEDDING,
        *attention(_MIXER, _NORM),
        *mamba(_MIXER, _NORM),
        Copy(at="-", hf=_NORM, key=_FC1 + "layer_norm_weight", sizes=("hidden_size",)),
        Copy(at="-", hf=_MIXER + "up_proj.weight", key=_FC1 + "weight", sizes=("ffn_hidden_size", "hidden_size"), tp_axis=0),
        *mlp_out(_MIXER + "down_proj."),
        *final_norm("backbone.norm_f.weight"),
        *output_layer(_EMBEDDING.hf),
    ),
)
