"""Maps of cells as SVG, in the colours of cividis, which the colour-blind can tell apart. Owns: cells, scale, ticks."""

import html
from collections.abc import Callable, Sequence
from typing import NamedTuple

CIVIDIS = ((0, 34, 78), (87, 93, 109), (165, 156, 116), (254, 232, 56))
STEPS, STEP_WIDTH, SCALE_WIDTH = 24, 4, 220
SMALLEST, LARGEST, LARGEST_WIDTH = 8, 56, 640
FONT = 12
CHARACTER, LARGE = 7, 8.5
"""width of a letter, about; where a narrow screen has larger ones"""
TICKS = 12


class Labels(NamedTuple):
    """What a map shows: along the columns, along the rows (from below), in the cells."""

    x: str
    y: str
    cells: str


def cells(
    values: Sequence[Sequence[float | None]],
    columns: Sequence[str],
    rows: Sequence[str],
    labels: Labels,
    shown: Callable[[float], str] = lambda value: f"{value:.3g}",
) -> str:
    """values: by row, the lowest first; None is an empty cell. shown: a cell's figure, written into it where there is room, and always its hint."""
    known = [value for row in values for value in row if value is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    size = min(LARGEST, max(SMALLEST, LARGEST_WIDTH / max(len(columns), len(rows))))
    left, top = 16 + CHARACTER * max(map(len, rows)), 42
    bottom = top + size * len(rows)
    marks = [text(4, 14, labels.cells, "start"), text(4, 32, f"by {labels.y} (up) and {labels.x} (across)", "start")]
    for line, row in enumerate(values):
        y = bottom - (line + 1) * size
        for place, value in enumerate(row):
            if value is None:
                marks.append(_empty(left + place * size, y, size))
            else:
                hint = f"{labels.x} {columns[place]}, {labels.y} {rows[line]}: {shown(value)}"
                marks.append(_cell(left + place * size, y, size, colour(value, low, high), hint))
                marks += _figure(left + place * size, y, size, shown(value), _is_light(value, low, high))
    marks += [text(left - 6, bottom - (line + 0.5) * size + 4, rows[line], "end") for line in _ticks(len(rows))]
    marks += [text(left + (place + 0.5) * size, bottom + 16, columns[place], "middle") for place in _ticks(len(columns))]
    marks.append(text(left + size * len(columns) / 2, bottom + 34, labels.x, "middle"))
    marks += scale(left, bottom + 44, low, high)
    longest = max(len(labels.cells), len(f"by {labels.y} (up) and {labels.x} (across)"))
    width = max(left + size * len(columns) + 24, left + SCALE_WIDTH, 8 + LARGE * longest)
    box = f'viewBox="0 0 {width:.0f} {bottom + 66:.0f}" width="{width:.0f}" height="{bottom + 66:.0f}"'
    described = html.escape(f"{labels.cells}, by {labels.x} and {labels.y}", quote=True)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box} role="img" aria-label="{described}" font-family="sans-serif">{"".join(marks)}</svg>'


def scale(left: float, y: float, low: float, high: float) -> list[str]:
    """The colours from the lowest figure to the highest, with both."""
    start = left + 56  # each step reaches below the next one, which leaves no hairline between them when the picture is scaled
    boxes = [
        f'<rect x="{start + step * STEP_WIDTH}" y="{y}" width="{STEP_WIDTH + (step < STEPS - 1)}" height="12" fill="{colour(step, 0, STEPS - 1)}"/>'
        for step in range(STEPS)
    ]
    return [text(start - 6, y + 10, f"{low:.3g}", "end"), *boxes, text(start + STEPS * STEP_WIDTH + 6, y + 10, f"{high:.3g}", "start")]


def colour(value: float, low: float, high: float) -> str:
    """Of a figure between the lowest and the highest."""
    return "#" + "".join(f"{channel:02x}" for channel in _channels(value, low, high))


def text(x: float, y: float, content: str, anchor: str) -> str:
    """A label in the page's own ink."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{FONT}" fill="currentColor">{html.escape(content)}</text>'


def _cell(x: float, y: float, size: float, fill: str, hint: str) -> str:
    box = f'x="{x:.1f}" y="{y:.1f}" width="{size - 1:.1f}" height="{size - 1:.1f}"'
    return f'<rect {box} fill="{fill}"><title>{html.escape(hint)}</title></rect>'


def _empty(x: float, y: float, size: float) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{size - 1:.1f}" height="{size - 1:.1f}" fill="none" stroke="#8886" stroke-width="0.5"/>'


def _figure(x: float, y: float, size: float, content: str, on_light: bool) -> list[str]:
    """The figure in its cell, dark on light colours and light on dark ones; nothing where there is no room."""
    if CHARACTER * len(content) > size - 2 or size < FONT + 2:
        return []
    ink = "#000" if on_light else "#fff"
    place = f'x="{x + size / 2:.1f}" y="{y + size / 2 + 4:.1f}" text-anchor="middle" font-size="{FONT}"'
    return [f'<text {place} style="fill:{ink};pointer-events:none">{html.escape(content)}</text>']


def _channels(value: float, low: float, high: float) -> tuple[int, int, int]:
    place = (value - low) / ((high - low) or 1.0) * (len(CIVIDIS) - 1)
    first = min(int(place), len(CIVIDIS) - 2)
    share = place - first
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(CIVIDIS[first], CIVIDIS[first + 1], strict=True))
    return red, green, blue


def _is_light(value: float, low: float, high: float) -> bool:
    """Whether dark ink reads better on it."""
    red, green, blue = _channels(value, low, high)
    return 0.299 * red + 0.587 * green + 0.114 * blue > 128


def _ticks(count: int) -> range:
    """Places that are labelled: at most TICKS, evenly taken."""
    return range(0, count, -(-count // TICKS))
