"""Mamba-2 as config.json says it: sizes that must fit together, and time-step limits (transformers 5 writes {"__float__": "Infinity"} in them).

Owns: reading them. Refuses: heads that groups do not divide, and limits that are no interval. No torch.
"""

from typing import Any

from megatron_prism.errors import UserError
from megatron_prism.families.family import Config
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


def checked(mamba: MambaConfig, heads: str, groups: str) -> MambaConfig:
    """The block, once its groups divide its heads. heads, groups: config.json's keys, for the message. Errors: UserError."""
    if mamba.num_heads % mamba.num_groups:
        raise UserError(f"{heads}={mamba.num_heads} must be a multiple of {groups}={mamba.num_groups}")
    return mamba


def switch(config: Config, key: str, default: bool) -> bool:
    """A key that is true or false. Errors: UserError when it is something else."""
    value: Any = default if config.get(key) is None else config[key]
    if not isinstance(value, bool):
        raise UserError(f"config.json says {key}={value!r}; it must be true or false")
    return value
