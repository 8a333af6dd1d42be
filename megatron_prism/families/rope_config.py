"""Rotary embeddings as config.json says them, in both forms: `rope_theta` + `rope_scaling`, and transformers 5's `rope_parameters`.

Owns: reading either into (rotary base, RopeScaling or None). Refuses: kinds and options that the engine has no frequencies for, by name.
"""

from collections.abc import Callable, Mapping
from typing import Any

from megatron_prism.errors import UserError
from megatron_prism.families.model_config import RopeScaling

KEYS = ("rope_theta", "rope_scaling", "rope_parameters")
OPTIONS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""rope type -> the options that it needs, all of them"""


def read_rope(config: Mapping[str, Any], default_base: float) -> tuple[float, RopeScaling | None]:
    """The rotary base and the scaling of a config.json.

    As in transformers, a scaling dictionary wins over the keys beside it. Errors: UserError for an unknown rope type or option, or a missing one.
    """
    block = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    kind = block.pop("rope_type", None) or block.pop("type", None) or "default"
    block.pop("type", None)  # old files carry both spellings
    base = block.pop("rope_theta", None) or config.get("rope_theta") or default_base
    if block.pop("partial_rotary_factor", None) not in (None, 1, 1.0):
        raise UserError("rope option partial_rotary_factor is not supported: this family turns whole heads")
    if kind not in OPTIONS:
        raise UserError(f"rope_type={kind!r} is not supported; this version has {', '.join(sorted(OPTIONS))}")
    missing = [name for name in OPTIONS[kind] if block.get(name) is None]
    if missing:
        raise UserError(f"rope_type={kind!r} needs {', '.join(missing)} in the config's rope options")
    unknown = sorted(name for name, value in block.items() if name not in OPTIONS[kind] and value is not None)
    if unknown and kind != "default":
        raise UserError(f"rope option {', '.join(unknown)} of rope_type={kind!r} is not supported; known: {', '.join(OPTIONS[kind])}")
    return float(base), None if kind == "default" else _scaling(kind, block)


def reader(default_base: float) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """A family's feature for `KEYS`: config.json -> ModelConfig fields."""

    def read(config: Mapping[str, Any]) -> Mapping[str, Any]:
        base, scaling = read_rope(config, default_base)
        return {"rotary_base": base, "rope_scaling": scaling}

    return read


def _scaling(kind: Any, block: Mapping[str, Any]) -> RopeScaling:
    options: dict[str, Any] = {name: float(block[name]) for name in OPTIONS[kind] if name != "original_max_position_embeddings"}
    if "original_max_position_embeddings" in OPTIONS[kind]:
        options["original_max_position_embeddings"] = int(block["original_max_position_embeddings"])
    return RopeScaling(kind=kind, **options)
