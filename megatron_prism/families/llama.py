"""LLaMA 1 to 3.x, and every model published as one (SmolLM2, ...)."""

from collections.abc import Mapping
from typing import Any

from megatron_prism.errors import UserError
from megatron_prism.families import rope_config
from megatron_prism.families.blocks import EMBEDDING, LAYER, attention, final_norm, mlp_in, mlp_out, output_layer
from megatron_prism.families.family import Config, Family
from megatron_prism.families.rules import Drop


def biases(config: Config) -> Mapping[str, Any]:
    """attention_bias and mlp_bias -> ModelConfig fields. Errors: UserError where only one of them is on."""
    attention, mlp = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    if attention != mlp:
        raise UserError(
            f"attention_bias={attention} with mlp_bias={mlp} is not supported: megatron-core has one switch (add_bias_linear) "
            "for the biases of the attention output and the MLP together"
        )
    return {"add_bias_linear": attention, "add_qkv_bias": attention}


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
    features={rope_config.KEYS: rope_config.reader(10_000.0), ("attention_bias", "mlp_bias"): biases},
    weights=(
        EMBEDDING,
        *attention(LAYER + "self_attn.", LAYER + "input_layernorm.weight"),
        Drop(LAYER + "self_attn.rotary_emb.inv_freq"),
        *mlp_in(LAYER + "mlp.{gate_up}_proj.", LAYER + "post_attention_layernorm.weight"),
        *mlp_out(LAYER + "mlp.down_proj."),
        *final_norm("model.norm.weight"),
        *output_layer(EMBEDDING.hf),
    ),
)
