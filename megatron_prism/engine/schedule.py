"""Learning-rate schedules as pure functions of the step: warm-up, then constant, linear, cosine, exponential or warm-up-stable-decay (WSD).

The rate of step t (counted from 0) is peak * factor(t). Warm-up rises linearly, (t + 1) / warmup_steps, so that the first step is not wasted.
"""

import math
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_prism.config import Block, Fraction, NonNegative, Positive


class ScheduleConfig(Block):
    """How the learning rate moves over a run. PRISM's mid-training: cosine, 500 warm-up steps, final fraction 0.1 (Table 16)."""

    kind: Literal["constant", "linear", "cosine", "exponential", "wsd"] = "cosine"
    """shape of the decay after warm-up"""
    warmup_steps: NonNegative = 0
    """steps of linear warm-up from 0"""
    final_lr_fraction: Fraction = 0.1
    """fraction of the peak at the end of the decay, and after it"""
    decay_steps: Positive | None = None
    """length of the decay; default: all steps after warm-up (wsd: required)"""
    decay_shape: Literal["linear", "cosine", "exponential"] = "linear"
    """wsd only: shape of its final decay"""
    decay_start: Annotated[int, Field(ge=0)] | None = None
    """wsd only: step at which the decay begins; default: steps - decay_steps. Several runs may branch off one stable checkpoint, each with its own"""

    @model_validator(mode="after")
    def _wsd_has_its_keys(self) -> "ScheduleConfig":
        if self.kind == "wsd" and self.decay_steps is None:
            raise ValueError("schedule.kind='wsd' needs schedule.decay_steps, the length of its final decay")
        if self.kind != "wsd" and self.decay_start is not None:
            raise ValueError(f"schedule.decay_start belongs to schedule.kind='wsd', not {self.kind!r}; drop it")
        return self


def constant(progress: float, final: float) -> float:
    """1, whatever the progress."""
    return 1.0


def linear(progress: float, final: float) -> float:
    """A straight line from 1 to `final`."""
    return 1.0 + (final - 1.0) * progress


def cosine(progress: float, final: float) -> float:
    """Half a cosine from 1 to `final` (Loshchilov & Hutter 2017)."""
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def exponential(progress: float, final: float) -> float:
    """a * exp(-progress) + b through (0, 1) and (1, final), with a = (1 - final) e / (e - 1).

    The shape of PRISM's 128k stage, there with final = 0 (Table 17).
    """
    scale = (1.0 - final) * math.e / (math.e - 1.0)
    return scale * math.exp(-progress) + (final * math.e - 1.0) / (math.e - 1.0)


SHAPES: dict[str, Callable[[float, float], float]] = {"constant": constant, "linear": linear, "cosine": cosine, "exponential": exponential}
"""Decay shapes: (progress from 0 to 1, final fraction) -> factor."""


def factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """Fraction of the peak rate at `step` (from 0) of a run of `steps`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.kind == "wsd":
        assert config.decay_steps is not None
        start = max(steps - config.decay_steps, config.warmup_steps) if config.decay_start is None else config.decay_start
        return SHAPES[config.decay_shape](_progress(step, start, config.decay_steps), config.final_lr_fraction)
    length = config.decay_steps or max(steps - config.warmup_steps, 1)
    return SHAPES[config.kind](_progress(step, config.warmup_steps, length), config.final_lr_fraction)


def _progress(step: int, start: int, length: int) -> float:
    return min(max((step - start) / length, 0.0), 1.0)
