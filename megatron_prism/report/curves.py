"""Curves for a page of bounded size. Pure; no torch.

Owns: thinning that hides no peak (of each stretch of steps the lowest and the highest value stay), and leaving out what is no number, counted.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

XY = tuple[float, float]


class Curve(NamedTuple):
    """A line to draw. kept of total points are there; strange: values that were no numbers."""

    name: str
    points: list[XY]
    total: int
    strange: int = 0

    @property
    def is_thinned(self) -> bool:
        """Whether some points are left out."""
        return len(self.points) < self.total


def curve(name: str, found: Iterable[tuple[float, Any]], limit: int) -> Curve:
    """A curve of at most `limit` points, by x."""
    every = sorted(((float(x), float(y)) for x, y in found if isinstance(y, int | float)), key=lambda point: point[0])
    known = [point for point in every if math.isfinite(point[1])]
    return Curve(name, thin(known, limit), len(known), len(every) - len(known))


def of_lines(name: str, lines: Sequence[Mapping[str, Any]], key: str, x: str, limit: int, scale: float = 1.0) -> Curve:
    """A key of a run's log by another one (step or tokens); lines without either are left out."""
    return curve(
        name,
        ((line[x], line[key] * scale if isinstance(line[key], int | float) else line[key]) for line in lines if key in line and x in line),
        limit,
    )


def thin(points: Sequence[XY], limit: int) -> list[XY]:
    """At most `limit` (4 or more) of the points: the first, the last, and of each stretch of equal width the lowest and the highest."""
    assert limit >= 4, limit
    if len(points) <= limit:
        return list(points)
    first, last, inner = points[0], points[-1], points[1:-1]
    stretches = (limit - 2) // 2
    low, width = inner[0][0], (inner[-1][0] - inner[0][0]) / stretches or 1.0
    parts: dict[int, list[XY]] = {}
    for point in inner:
        parts.setdefault(min(int((point[0] - low) / width), stretches - 1), []).append(point)
    kept = [first]
    for part in parts.values():
        extremes = {id(min(part, key=lambda point: point[1])), id(max(part, key=lambda point: point[1]))}
        kept += [point for point in part if id(point) in extremes]
    return [*kept, last]
