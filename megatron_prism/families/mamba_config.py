"""Mamba-2 as config.json says it: sizes that must fit together, and time-step limits (transformers 5 writes {"__float__": "Infinity"} in them).

Owns: reading them. Refuses: heads that groups do not divide, and limits that are no interval. No torch.
"""

from collections.abc import Mapping
from typing import Any

from megatron_prism.errors import UserError
from megatron_prism.families.family import Config, size
from megatron_prism.families.model_config import MambaConfig

NO_LIMIT = (0.0, float("inf"))


def limits(config: Config, key: str = "time_step_limit") -> tuple[float, float]:
    """Bounds of the time step: [low, high], high often infinite in one of its spellings. Missing or null: none. Errors: UserError."""
    value = config.get(key)
    if value is None:
        return NO_LIMIT
    try:
        low, high = (float(item["__float__"] if isinstance(item, dict) else item) for item in value)
    except (TypeError, ValueError, KeyError):
        raise UserError(f"config.json says {key}={value!r}; it must be two numbers, the second often Infinity") from None
    if not 0 <= low < high:
        raise UserError(f"config.json says {key}={value!r}; it must be a low bound >= 0 and a higher one")
    return low, high


def _switch(config: Config, key: str) -> bool:
    value: Any = True if config.get(key) is None else config[key]
    if not isinstance(value, bool):
        raise UserError(f"config.json says {key}={value!r}; it must be true or false")
    return value


def block(config: Config, sizes: Mapping[str, tuple[str, int]], conv_bias: str, **values: Any) -> MambaConfig:
    """The mixer of a config.json. sizes: key -> (MambaConfig field, default); conv_bias: the key of that switch; values: fields read otherwise.

    Errors: UserError for a size that is none, or groups that do not divide the heads.
    """
    read: dict[str, Any] = {field: size(config, key, default) for key, (field, default) in sizes.items()}
    groups = read["num_groups"]
    mamba = MambaConfig(**read, **values, norm_groups=groups, conv_bias=_switch(config, conv_bias))
    if mamba.num_heads % groups:
        names = {field: key for key, (field, _) in sizes.items()}
        raise UserError(f"{names['num_heads']}={mamba.num_heads} must be a multiple of {names['num_groups']}={groups}")
    return mamba
