"""The config.json of an export: as it is where transformers 4.57 reads it too, else with the keys that models are published with.

transformers 5 writes `rope_parameters` and new names of layer kinds, which 4.57 does not know: it would take its default rotary base without a word.
Owns: adding what it needs. Nothing is taken away, so transformers 5 and vLLM read the result as they read the original. No torch.
"""

from collections.abc import Mapping
from typing import Any

UNKNOWN_TO_4 = frozenset({"nemotron_h"})
"""model types that transformers 4.57 does not have; their configs have no older form"""
_PUBLISHED_KINDS = {"granitemoehybrid": {"linear_attention": "mamba", "full_attention": "attention"}}
"""model type -> a layer's kind as transformers 5 writes it -> as published (4.57 refuses the other; 5 reads both)"""


def export_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that transformers 4.57, transformers 5 and vLLM read as the same model. Equal to `config` when nothing was missing."""
    if config.get("model_type") in UNKNOWN_TO_4:
        return dict(config)
    added = {**_rope(config), **_layer_kinds(config)}
    if added and config.get("dtype") is not None and "torch_dtype" not in config:
        added["torch_dtype"] = config["dtype"]
    return {**config, **added}


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling from rope_parameters, where neither is there."""
    block = config.get("rope_parameters")
    if not isinstance(block, dict) or "rope_theta" not in block or "rope_theta" in config or config.get("rope_scaling"):
        return {}
    scaling = {key: value for key, value in block.items() if key != "rope_theta"}
    plain = scaling.get("rope_type", "default") == "default"
    return {"rope_theta": block["rope_theta"], "rope_scaling": None if plain else scaling}


def _layer_kinds(config: Mapping[str, Any]) -> dict[str, Any]:
    names = _PUBLISHED_KINDS.get(str(config.get("model_type")), {})
    kinds = config.get("layer_types")
    if not isinstance(kinds, list) or not set(kinds) & set(names):
        return {}
    return {"layer_types": [names.get(kind, kind) for kind in kinds]}
