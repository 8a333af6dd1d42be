"""Rotary embeddings as config.json says them, in both forms: `rope_theta` + `rope_scaling`, and transformers 5's `rope_parameters`.

Owns: reading either into (rotary base, RopeScaling or None). Refuses: kinds and options that the engine has no frequencies for, by name.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from megatron_prism.errors import UserError
from megatron_prism.families.model_config import RopeScaling

KEYS = ("rope_theta", "rope_scaling", "rope_parameters")
OPTIONS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""rope type -> the options that it needs, all of them"""
OPTIONAL = {"yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")}
"""rope type -> those that it may have"""


def read_rope(config: Mapping[str, Any], default_base: float) -> tuple[float, RopeScaling | None]:
    """The rotary base and the scaling of a config.json.

    Errors: UserError for an unknown rope type or option, a missing one, or two bases: transformers 5 would take the block's, 4.57 the other.
    """
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise UserError(f"the config's rope options must be one object, not {given!r}")
    block = dict(given)
    kind = block.pop("rope_type", None) or block.pop("type", None) or "default"
    block.pop("type", None)  # old files carry both spellings
    inside, beside = block.pop("rope_theta", None), config.get("rope_theta")
    if inside and beside and inside != beside:
        raise UserError(
            f"rope_theta={beside!r} differs from rope_theta={inside!r} of the config's rope options; keep the one that the model was trained with"
        )
    base = _number("rope_theta", inside or beside or default_base)
    if block.pop("partial_rotary_factor", None) not in (None, 1, 1.0):
        raise UserError("rope option partial_rotary_factor is not supported: this family turns whole heads")
    if kind not in OPTIONS:
        raise UserError(f"rope_type={kind!r} is not supported; this version has {', '.join(sorted(OPTIONS))}")
    missing = [name for name in OPTIONS[kind] if block.get(name) is None]
    if missing:
        raise UserError(f"rope_type={kind!r} needs {', '.join(missing)} in the config's rope options")
    known = (*OPTIONS[kind], *OPTIONAL.get(kind, ()))
    unknown = sorted(name for name, value in block.items() if name not in known and value is not None)
    if unknown and kind != "default":
        raise UserError(f"rope option {', '.join(unknown)} of rope_type={kind!r} is not supported; known: {', '.join(known)}")
    return base, None if kind == "default" else _scaling(kind, block)


def reader(default_base: float) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """A family's feature for `KEYS`: config.json -> ModelConfig fields."""

    def read(config: Mapping[str, Any]) -> Mapping[str, Any]:
        base, scaling = read_rope(config, default_base)
        return {"rotary_base": base, "rope_scaling": scaling}

    return read


def _scaling(kind: Any, block: Mapping[str, Any]) -> RopeScaling:
    options: dict[str, Any] = {name: _number(name, block[name]) for name in OPTIONS[kind]}
    if "original_max_position_embeddings" in options:
        options["original_max_position_embeddings"] = int(options["original_max_position_embeddings"])
    return RopeScaling(kind=kind, **options, **(_yarn_options(block) if kind == "yarn" else {}))


def _yarn_options(block: Mapping[str, Any]) -> dict[str, Any]:
    """The options of yarn with transformers' defaults; two `mscale` stand for an attention factor."""
    given = {name: _number(name, block[name]) for name in OPTIONAL["yarn"][:-1] if block.get(name)}
    factor, mscale, of_all = block["factor"], given.pop("mscale", 0.0), given.pop("mscale_all_dim", 0.0)
    inferred = _temperature(factor, mscale) / _temperature(factor, of_all) if mscale and of_all else _temperature(factor)
    return {"attention_factor": inferred, "truncate": block.get("truncate", True) is not False, **given}


def _temperature(factor: float, mscale: float = 1.0) -> float:
    """YaRN's factor of queries and keys (arXiv 2309.00071, equation 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _number(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise UserError(f"config.json says {name}={value!r}; it must be a positive number")
    return float(value)
