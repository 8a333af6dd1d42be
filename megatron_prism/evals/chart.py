"""Lines over an axis, as SVG that needs nothing but itself: in the report, and as a picture of its own. Owns: scales, ticks, the legend."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 760, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 40, 32, 84
COLOURS = ("#7c93b2", "#d98b4a", "#6aa57a", "#b46a8e", "#8b7fc7", "#b3a04a")
LEGEND_WIDTH = 180
DASHES = ("", "8 4", "2 4", "10 4 2 4")
"""of one line after another, so that one that lies on another leaves it to be seen"""


class Point(NamedTuple):
    """A value with its standard error."""

    x: float
    y: float
    error: float = 0.0


class Axes(NamedTuple):
    """x_ticks: (place, label). y_range: None is that of the points, a little wider. log_x: each doubling is as wide as the next."""

    x_label: str
    y_label: str
    x_ticks: Sequence[tuple[float, str]]
    y_range: tuple[float, float] | None = None
    log_x: bool = False


def lines(series: Mapping[str, Sequence[Point]], axes: Axes, colours: Sequence[str] = COLOURS) -> str:
    """One line a name, with whiskers of one standard error."""
    points = [point for line in series.values() for point in line]
    low, high = axes.y_range or _wider(min(point.y - point.error for point in points), max(point.y + point.error for point in points))
    shown = [*(point.x for point in points), *(x for x, _ in axes.x_ticks)]
    first, last = _warp(min(shown), axes), _warp(max(shown), axes)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (_warp(x, axes) - first) / ((last - first) or 1.0)
        return LEFT + across * (WIDTH - LEFT - RIGHT), TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [_y_tick(value, place(points[0].x, value)[1]) for value in _round_values(low, high)]
    parts += [_x_tick(label, place(x, low)[0]) for x, label in axes.x_ticks]
    parts += [_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - BOTTOM + 38, axes.x_label, "middle"), _text(8, 14, axes.y_label, "start")]
    for number, (name, line) in enumerate(series.items()):
        colour = colours[number % len(colours)]
        dash = f' stroke-dasharray="{DASHES[number % len(DASHES)]}"' if number % len(DASHES) else ""
        found = [(place(point.x, point.y), place(point.x, point.y - point.error)[1] - place(point.x, point.y)[1]) for point in line]
        parts.append(_line(found, colour, dash))
        x, y = LEFT + number % 4 * LEGEND_WIDTH, HEIGHT - 28 + number // 4 * 16
        parts += [f'<path d="M{x} {y + 6}h26" stroke="{colour}" stroke-width="3"{dash}/>', _text(x + 32, y + 10, name, "start")]
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    label = html.escape(f"{axes.y_label} by {axes.x_label}", quote=True)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{label}" font-family="sans-serif">{"".join(parts)}</svg>'


def picture(svg: str) -> str:
    """A chart as a file of its own: on white."""
    head, rest = svg.split(">", 1)
    return f'{head}><rect width="100%" height="100%" fill="#fff"/>{rest}\n'


def _line(points: Sequence[tuple[tuple[float, float], float]], colour: str, dash: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for (x, y), _ in points)
    marks = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/><path d="M{x:.1f} {y - error:.1f}V{y + error:.1f}" stroke="{colour}"/>'
        for (x, y), error in points
    )
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>{marks}'


def _y_tick(value: float, y: float) -> str:
    grid = f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#8888" stroke-width="0.5"/>'
    return grid + _text(LEFT - 8, y + 4, f"{value:g}", "end")


def _x_tick(label: str, x: float) -> str:
    return _text(x, HEIGHT - BOTTOM + 18, label, "middle")


def _text(x: float, y: float, content: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="12" fill="currentColor">{html.escape(content)}</text>'


def _warp(x: float, axes: Axes) -> float:
    return math.log2(x) if axes.log_x else x


def _wider(low: float, high: float) -> tuple[float, float]:
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def _round_values(low: float, high: float) -> list[float]:
    """Four to ten values of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [round(number * step, 10) for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
