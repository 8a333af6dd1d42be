"""LLaMA 1 to 3.x, and every model published as one (SmolLM2, ...)."""

from collections.abc import Mapping
from typing import Any

from megatron_prism.errors import UserError
from megatron_prism.families import rope_config
from megatron_prism.families.family import Config, Family
from megatron_prism.families.rules import Copy, Drop, FuseGateUp, FuseQKV, Tied


def _rope(config: Config) -> Mapping[str, Any]:
    base, scaling = rope_config.read_rope(config, default_base=10_000.0)
    return {"rotary_base": base, "rope_scaling": scaling}


def _biases(config: Config) -> Mapping[str, Any]:
    attention, mlp = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    if attention != mlp:
        raise UserError(
            f"attention_bias={attention} with mlp_bias={mlp} is not supported: megatron-core has one switch (add_bias_linear) "
            "for the biases of the attention output and the MLP together"
        )
    return {"add_bias_linear": attention, "add_qkv_bias": attention}


_HF, _MCORE = "model.layers.{i}.", "decoder.layers."
_ATTENTION, _MLP = _MCORE + "self_attention.", _MCORE + "mlp."

LLAMA = Family(
    hf_type="llama",
    config={
        "num_hidden_layers": "num_layers",
        "hidden_size": "hidden_size",
        "intermediate_size": "ffn_hidden_size",
        "num_attention_heads": "num_attention_heads",
        "num_key_value_heads": "num_query_groups",
        "head_dim": "kv_channels",
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_position_embeddings",
        "rms_norm_eps": "layernorm_epsilon",
        "tie_word_embeddings": "share_embeddings_and_output_weights",
        "initializer_range": "init_method_std",
    },
    defaults={
        "num_key_value_heads": lambda config: config["num_attention_heads"],
        "head_dim": lambda config: config["hidden_size"] // config["num_attention_heads"],
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
    },
    fixed={
        "hidden_act": ("silu", "swish"),
        "pretraining_tp": (1,),
        "attention_dropout": (0, 0.0),
        "rope_interleaved": (False,),
    },
    features={rope_config.KEYS: _rope, ("attention_bias", "mlp_bias"): _biases},
    weights=(
        Copy(hf="model.embed_tokens.weight", key="embedding.word_embeddings.weight", sizes=("vocab_size", "hidden_size"), tp_axis=0, padded=True),
        # TransformerEngine fuses the norm into the linear layer after it, and megatron-core's global names follow it in every layer spec
        Copy(at="*", hf=_HF + "input_layernorm.weight", key=_ATTENTION + "linear_qkv.layer_norm_weight", sizes=("hidden_size",)),
        FuseQKV(at="*", hf=_HF + "self_attn.{qkv}_proj.weight", key=_ATTENTION + "linear_qkv.weight", columns=("hidden_size",)),
        FuseQKV(at="*", hf=_HF + "self_attn.{qkv}_proj.bias", key=_ATTENTION + "linear_qkv.bias", when="add_qkv_bias"),
        Copy(at="*", hf=_HF + "self_attn.o_proj.weight", key=_ATTENTION + "linear_proj.weight", sizes=("hidden_size", "query_size"), tp_axis=1),
        Copy(at="*", hf=_HF + "self_attn.o_proj.bias", key=_ATTENTION + "linear_proj.bias", sizes=("hidden_size",), when="add_bias_linear"),
        Drop(_HF + "self_attn.rotary_emb.inv_freq"),
        Copy(at="-", hf=_HF + "post_attention_layernorm.weight", key=_MLP + "linear_fc1.layer_norm_weight", sizes=("hidden_size",)),
        FuseGateUp(at="-", hf=_HF + "mlp.{gate_up}_proj.weight", key=_MLP + "linear_fc1.weight", columns=("hidden_size",)),
        FuseGateUp(at="-", hf=_HF + "mlp.{gate_up}_proj.bias", key=_MLP + "linear_fc1.bias", when="add_bias_linear"),
        Copy(at="-", hf=_HF + "mlp.down_proj.weight", key=_MLP + "linear_fc2.weight", sizes=("hidden_size", "ffn_hidden_size"), tp_axis=1),
        Copy(at="-", hf=_HF + "mlp.down_proj.bias", key=_MLP + "linear_fc2.bias", sizes=("hidden_size",), when="add_bias_linear"),
        Copy(hf="model.norm.weight", key="decoder.final_layernorm.weight", sizes=("hidden_size",), when="not is_hybrid"),
        Copy(hf="model.norm.weight", key="decoder.final_norm.weight", sizes=("hidden_size",), when="is_hybrid"),
        Copy(
            hf="lm_head.weight",
            key="output_layer.weight",
            sizes=("vocab_size", "hidden_size"),
            tp_axis=0,
            padded=True,
            when="not share_embeddings_and_output_weights",
        ),
        Tied("lm_head.weight", same_as="model.embed_tokens.weight", when="share_embeddings_and_output_weights"),
    ),
)
