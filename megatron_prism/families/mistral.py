"""Mistral 7B and Mistral Small: LLaMA with a sliding window, a head dimension of its own, and no biases."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_prism.families import rope_config
from megatron_prism.families.family import Config, Family, kv_heads, size
from megatron_prism.families.llama import LLAMA


def _window(config: Config) -> Mapping[str, Any]:
    if "sliding_window" in config and config["sliding_window"] is None:
        return {"sliding_window": None}  # said to be none; left out, transformers takes the first model's
    return {"sliding_window": size(config, "sliding_window", 4096)}


MISTRAL: Family = replace(
    LLAMA,
    hf_type="mistral",
    defaults={
        **LLAMA.defaults,
        "num_key_value_heads": kv_heads(8),
        "max_position_embeddings": 131_072,
    },
    features={rope_config.KEYS: rope_config.reader(10_000.0), ("sliding_window",): _window},
)
