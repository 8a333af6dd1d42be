"""SmolLM3: LLaMA without rotary embeddings in some layers (every fourth, in the published model)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_prism.errors import UserError
from megatron_prism.families import rope_config
from megatron_prism.families.family import Config, Family, kv_heads, layer_kinds, size
from megatron_prism.families.llama import LLAMA, biases


def _no_rope(config: Config) -> Mapping[str, Any]:
    """`no_rope_layers` has a 1 for each layer that does turn; without the list, each `no_rope_layer_interval`-th layer does not."""
    layers, turns = size(config, "num_hidden_layers"), config.get("no_rope_layers")
    if turns is None:
        interval = size(config, "no_rope_layer_interval", 4)
        turns = [int((layer + 1) % interval != 0) for layer in range(layers)]
    if not isinstance(turns, list) or len(turns) < layers or any(turn not in (0, 1) for turn in turns):
        raise UserError(f"no_rope_layers={turns!r} must hold a 1 (with rotary embeddings) or 0 for each of num_hidden_layers={layers} layers")
    return {"no_rope_layers": tuple(layer for layer in range(layers) if not turns[layer])}


def _no_window(config: Config) -> Mapping[str, Any]:
    kinds = layer_kinds(config, "layer_types")
    if (config.get("use_sliding_window") and config.get("sliding_window")) or set(kinds or ()) - {"full_attention"}:
        raise UserError("use_sliding_window is not supported for smollm3, nor layer_types other than full_attention")
    return {}


SMOLLM3: Family = replace(
    LLAMA,
    hf_type="smollm3",
    defaults={
        **LLAMA.defaults,
        "num_key_value_heads": kv_heads(4),
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": True,
    },
    fixed={key: values for key, values in LLAMA.fixed.items() if key != "pretraining_tp"},
    features={
        rope_config.KEYS: rope_config.reader(2_000_000.0),
        ("attention_bias", "mlp_bias"): biases,
        ("no_rope_layers", "no_rope_layer_interval"): _no_rope,
        ("use_sliding_window", "sliding_window", "layer_types"): _no_window,
    },
    ignored=("pretraining_tp", "max_window_layers"),
)
