"""Axes: from values to places on a picture, and the values that are written beside it. Pure. Owns: round ticks, and how numbers read on an axis."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


class Axis(NamedTuple):
    """What an axis shows. label: with its unit. span: fixed ends; None: the values', a little wider. log: each factor is as wide as the next.
    from_zero: a count or a share, which begins there. whole: only whole numbers are written. at: the values that
    are written, where they are not left to us."""

    label: str
    span: tuple[float, float] | None = None
    log: bool = False
    from_zero: bool = False
    whole: bool = False
    at: tuple[float, ...] = ()

    def is_logarithmic(self, values: Sequence[float]) -> bool:
        """Whether it is drawn so: a logarithm of nothing but positive values; else the axis is linear."""
        return self.log and all(value > 0 for value in values)


STEPS = Axis("step", whole=True)


class Scale(NamedTuple):
    """An axis laid out: values low to high on places start to stop."""

    low: float
    high: float
    start: float
    stop: float
    log: bool
    whole: bool = False
    at: tuple[float, ...] = ()

    def place(self, value: float) -> float:
        """Where a value lies."""
        low, high, at = (math.log10(part) if self.log else part for part in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.stop - self.start)

    def ticks(self, count: int = 5) -> list[tuple[float, str]]:
        """Round values in reach, about so many, as they are written."""
        if self.at:
            return [(value, f"{value:,g}") for value in self.at]
        return decades(self.low, self.high) if self.log else _written(round_values(self.low, self.high, count, self.whole))


def scale(axis: Axis, values: Sequence[float], start: float, stop: float, margin: float = 0.05) -> Scale:
    """The scale that an axis of these values has."""
    log = axis.is_logarithmic(values)
    low, high = axis.span or (min(values), max(values))
    if axis.from_zero and not log:
        return Scale(min(0.0, low), (high + (high - min(0.0, low)) * margin) or 1.0, start, stop, log, axis.whole, axis.at)
    if low == high:
        low, high = (low / 2, high * 2) if log else (low - (abs(low) * margin or 0.5), high + (abs(high) * margin or 0.5))
    elif axis.span is None:
        wider = (high / low) ** margin if log else (high - low) * margin
        low, high = (low / wider, high * wider) if log else (low - wider, high + wider)
    return Scale(low, high, start, stop, log, axis.whole, axis.at)


def round_values(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, about `count` of them. whole: whole numbers alone."""
    rough = max((high - low) / count, 1.0 if whole else 0.0)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.7)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def decades(low: float, high: float) -> list[tuple[float, str]]:
    """Powers of ten in reach, thinned to six; below two of them also their double and fivefold."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    powers = list(range(first, last + 1))
    if len(powers) > 1:
        powers = powers[:: -(-len(powers) // 6)]
        return [(10.0**power, number(10.0**power)) for power in powers]
    fine = [factor * 10.0**power for power in range(first - 1, last + 2) for factor in (1, 2, 5)]
    reached = [value for value in fine if low <= value <= high]
    return [(value, number(value)) for value in reached] if len(reached) > 2 else _written(round_values(low, high, 4))


def number(value: float) -> str:
    """A figure for people: three digits, thousands and more with their prefix."""
    if value == 0:
        return "0"
    value = float(f"{value:.3g}")  # so that 999.9 is 1k
    size = abs(value)
    factor, name = next(((factor, name) for factor, name in PREFIXES if size >= factor), (1.0, ""))
    if size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    text = f"{value / factor:.3g}"
    return f"{float(text):g}{name}" if "e" in text else f"{text}{name}"


def _written(values: Sequence[float]) -> list[tuple[float, str]]:
    """With as many digits as tell them apart."""
    largest = max(map(abs, values), default=0.0)
    factor, name = next(((factor, name) for factor, name in PREFIXES if largest >= factor), (1.0, ""))
    step = min((abs(after - before) for before, after in pairwise(values)), default=largest or 1.0) / factor
    if largest and largest < 1e-3:
        return [(value, number(value)) for value in values]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return [(value, "0" if abs(value) < 1e-12 * largest else f"{value / factor:.{digits}f}{name}") for value in values]
