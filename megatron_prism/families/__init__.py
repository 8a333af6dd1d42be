"""Model families: what we know of each, as data. A new family is one file and one line here. No torch at import."""

import json
from pathlib import Path
from typing import Any

from megatron_prism.errors import UserError
from megatron_prism.families.export_form import export_config
from megatron_prism.families.family import Family
from megatron_prism.families.granite import GRANITE
from megatron_prism.families.granite_moe_hybrid import GRANITE_MOE_HYBRID
from megatron_prism.families.llama import LLAMA
from megatron_prism.families.mistral import MISTRAL
from megatron_prism.families.model_config import ModelConfig
from megatron_prism.families.nemotron_h import NEMOTRON_H
from megatron_prism.families.smollm3 import SMOLLM3

FAMILIES = {family.hf_type: family for family in (LLAMA, MISTRAL, GRANITE, GRANITE_MOE_HYBRID, SMOLLM3, NEMOTRON_H)}

_PUBLISHED = Path(__file__).parent / "published"
PUBLISHED = tuple(sorted(path.stem for path in _PUBLISHED.glob("*.json")))
"""models whose true config is here, by name (see `published`)"""

__all__ = ["FAMILIES", "PUBLISHED", "Family", "ModelConfig", "export_config", "find", "load", "published", "read_config"]


def published(name: str) -> dict[str, Any]:
    """The config.json of one of `PUBLISHED`, in the form in which it was published; its `_source` says where that was read.

    Errors: UserError for another name.
    """
    if name not in PUBLISHED:
        raise UserError(f"no config of a model called {name!r} is kept here; known: {', '.join(PUBLISHED)}")
    config: dict[str, Any] = json.loads((_PUBLISHED / f"{name}.json").read_text(encoding="utf-8"))
    return config


def find(hf_config: dict[str, Any]) -> Family:
    """The family of a config.json. Errors: UserError naming an unknown model_type, or a quantised model."""
    hf_type = hf_config.get("model_type")
    if not isinstance(hf_type, str) or hf_type not in FAMILIES:
        raise UserError(f"model_type={hf_type!r} is not supported; this version has {', '.join(sorted(FAMILIES))}")
    if hf_config.get("quantization_config"):
        raise UserError("quantization_config is not supported: give the model in its unquantised form")
    return FAMILIES[hf_type]


def read_config(hf_dir: Path) -> dict[str, Any]:
    """The config.json of a folder. Errors: UserError when it is missing or is not a JSON object."""
    path = Path(hf_dir) / "config.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a folder as Hugging Face transformers writes it (config.json beside *.safetensors)")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold one JSON object")
    return config


def load(hf_dir: Path) -> tuple[Family, ModelConfig]:
    """Family and model of a folder that has a config.json. Errors: UserError naming the file and what is wrong in it."""
    config = read_config(hf_dir)
    try:
        family = find(config)
        return family, family.model_config(config)
    except UserError as error:
        raise UserError(f"{Path(hf_dir) / 'config.json'}: {error}") from None
