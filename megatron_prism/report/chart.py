"""Pictures as SVG within the page: lines, intervals, bars. Colours are the page's (so that light, dark and print have their own), and never alone:
each line has a dash and a mark of its own, each bar its name.

Owns: how a picture looks; what a script needs to read values off it stands in data attributes. The palette is Okabe and Ito's, darkened or lightened
until it stands out from the ground: style.py.
"""

import html
from collections.abc import Sequence
from typing import NamedTuple

from megatron_prism.report.curves import Curve
from megatron_prism.report.scales import Axis, Scale, number, scale

WIDTH, HEIGHT = 480, 290
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 32, 46
COLOURS = 7
DASHES = ("", "7 3", "2 3", "9 3 2 3")
MARKED_POINTS = 40
"""more points than these are a line alone"""
ROW, LABEL = 19, 8.2
"""height of a line of bars or intervals; width of a letter"""


class Mark(NamedTuple):
    """Something that happened at one x."""

    x: float
    text: str


class Interval(NamedTuple):
    """A value between its limits. style: number of its colour and mark."""

    label: str
    value: float
    low: float
    high: float
    style: int


def style_of(place: int) -> str:
    """The classes of the place-th of several things: its colour."""
    return f"s{place % COLOURS}"


def lines(
    curves: Sequence[Curve],
    x: Axis,
    y: Axis,
    marks: Sequence[Mark] = (),
    first_style: int = 0,
    bands: Sequence[Sequence[tuple[float, float, float]]] = (),
) -> str:
    """Curves over one axis. bands: for each curve (x, low, high), shaded. Empty where no curve has a point."""
    drawn = [(place + first_style, one) for place, one in enumerate(curves) if one.points]
    if not drawn:
        return ""
    xs = [at for _, one in drawn for at, _ in one.points]
    ys = [at for _, one in drawn for _, at in one.points] + [limit for band in bands for _, low, high in band for limit in (low, high)]
    across = scale(x, xs, LEFT, WIDTH - RIGHT, margin=0.02)
    up = scale(y, ys, HEIGHT - BOTTOM, TOP)
    parts = [_frame(across, up, x, y)]
    parts += [_event(across.place(mark.x), mark.text) for mark in marks if across.low <= mark.x <= across.high]
    parts += [_band(band, across, up, place + first_style) for place, band in enumerate(bands) if band]
    parts += [_line(one, across, up, place) for place, one in drawn]
    data = f'data-x="{_data(across)}" data-y="{_data(up)}"'
    label = f"{y.label} by {x.label}: {', '.join(one.name for _, one in drawn)}"
    return _svg(WIDTH, HEIGHT, label, "".join(parts), " plot", f' tabindex="0" {data}')


def legend(names: Sequence[str], first_style: int = 0) -> str:
    """The names of lines, each with its colour, dash and mark."""
    entries = "".join(f"<li>{_swatch(place + first_style)}{html.escape(name)}</li>" for place, name in enumerate(names))
    return f'<ul class="legend">{entries}</ul>'


def intervals(rows: Sequence[Interval], axis: Axis, title: str) -> str:
    """Values with their limits, one below the other."""
    left = 14 + LABEL * min(28, max(len(row.label) for row in rows))
    bottom = 10 + ROW * len(rows)
    across = scale(axis, [limit for row in rows for limit in (row.low, row.high)], left, WIDTH - 54)
    parts = [_x_ticks(across, 4, bottom), _axis_title((left + WIDTH - 54) / 2, bottom + 36, axis.label)]
    for line, row in enumerate(rows):
        y = 10 + ROW * (line + 0.5)
        low, at, high = (across.place(min(max(value, across.low), across.high)) for value in (row.low, row.value, row.high))
        hint = html.escape(f"{row.label}: {number(row.value)} ({number(row.low)} to {number(row.high)})")
        whisker = f"M{low:.1f} {y:.1f}H{high:.1f}M{low:.1f} {y - 4:.1f}v8M{high:.1f} {y - 4:.1f}v8"
        parts.append(
            f'<g class="{style_of(row.style)}"><title>{hint}</title><path class="whisker-line" d="{whisker}"/>{_mark(at, y, row.style, 4.5)}</g>'
        )
        parts += [_text(left - 8, y + 4, _short(row.label), "end"), _text(WIDTH - 48, y + 4, number(row.value), "start")]
    return _svg(WIDTH, bottom + 44, f"{title}: {axis.label}", "".join(parts))


def bars(rows: Sequence[tuple[str, Sequence[float | None]]], names: Sequence[str], axis: Axis) -> str:
    """Groups of horizontal bars: a group a row, a bar a name, the second one hatched, so that they differ without colour."""
    thick, gap = 11, 8
    group = len(names) * (thick + 2) + gap
    left = 14 + LABEL * min(28, max(len(label) for label, _ in rows))
    bottom = 6 + group * len(rows)
    across = scale(
        axis._replace(span=axis.span or (0.0, 1.08 * max((value or 0.0 for _, values in rows for value in values), default=1.0) or 1.0)),
        [0.0],
        left,
        WIDTH - 54,
    )
    parts = [_x_ticks(across, 4, bottom), _axis_title((left + WIDTH - 54) / 2, bottom + 36, axis.label)]
    for line, (label, values) in enumerate(rows):
        top = 6 + group * line
        parts.append(_text(left - 8, top + (group - gap) / 2 + 4, _short(label), "end"))
        for place, value in enumerate(values):
            if value is not None:
                y, width = top + place * (thick + 2), across.place(value) - left
                hint = f"<title>{html.escape(f'{label}, {names[place]}: {number(value)}')}</title>"
                parts.append(
                    f'<rect class="bar {style_of(place)}" x="{left:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{thick}">{hint}</rect>'
                )
                if place:
                    parts.append(
                        f'<path class="hatch" d="{"".join(f"M{at:.1f} {y + thick:.1f}l{thick} -{thick}" for at in _stripes(left, width, thick))}"/>'
                    )
                parts.append(_text(left + width + 5, y + thick - 2, number(value), "start", "small"))
    return _svg(WIDTH, bottom + 44, f"{axis.label}: {', '.join(names)}", "".join(parts))


def bar_legend(names: Sequence[str]) -> str:
    """The names of bars."""
    entries = []
    for place, name in enumerate(names):
        hatch = '<path class="hatch" d="M4 12l10 -10M12 12l10 -10"/>' if place else ""
        box = f'<rect class="bar {style_of(place)}" x="1" y="2" width="24" height="10"/>{hatch}'
        entries.append(f'<li><svg width="26" height="14" aria-hidden="true">{box}</svg>{html.escape(name)}</li>')
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _stripes(left: float, width: float, thick: int) -> list[float]:
    return [left + at for at in range(0, max(0, int(width) - thick), 7)]


def _frame(across: Scale, up: Scale, x: Axis, y: Axis) -> str:
    grid = "".join(
        f'<path class="grid" d="M{LEFT} {up.place(value):.1f}H{WIDTH - RIGHT}"/>{_text(LEFT - 7, up.place(value) + 4, label, "end")}'
        for value, label in up.ticks()
    )
    titles = _axis_title((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x.label) + _text(4, 15, y.label, "start", "axis-title")
    return grid + _x_ticks(across, 5, HEIGHT - BOTTOM, TOP) + titles


def _x_ticks(across: Scale, count: int, bottom: float, top: float | None = None) -> str:
    found = [f'<path class="axis" d="M{across.start:.1f} {bottom:.1f}H{across.stop:.1f}"/>']
    for value, label in across.ticks(count):
        x = across.place(value)
        tick = f'<path class="grid" d="M{x:.1f} 8V{bottom:.1f}"/>' if top is None else f'<path class="axis" d="M{x:.1f} {bottom:.1f}v4"/>'
        found.append(tick + _text(x, bottom + 18, label, "middle"))
    return "".join(found)


def _line(one: Curve, across: Scale, up: Scale, place: int) -> str:
    at = [(across.place(x), up.place(min(max(y, up.low), up.high))) for x, y in one.points]
    points = " ".join(f"{x:.2f},{y:.1f}" for x, y in at)  # values are read off these
    dash = f' stroke-dasharray="{DASHES[place % len(DASHES)]}"' if DASHES[place % len(DASHES)] else ""
    marks = "".join(_mark(x, y, place, 3) for x, y in at) if len(at) <= MARKED_POINTS else ""
    return f'<g class="{style_of(place)}"><polyline class="line" data-name="{html.escape(one.name, quote=True)}" points="{points}"{dash}/>{marks}</g>'


def _mark(x: float, y: float, place: int, size: float) -> str:
    """A circle, square, triangle or diamond; with its dash each of the first sixteen lines is one of a kind, whatever is seen of colours."""
    shape = (place + place // len(DASHES)) % 4
    if shape == 0:
        return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="{size}"/>'
    path = {
        1: f"M{x - size:.1f} {y - size:.1f}h{2 * size}v{2 * size}h{-2 * size}z",
        2: f"M{x:.1f} {y - 1.2 * size:.1f}L{x + 1.2 * size:.1f} {y + size:.1f}H{x - 1.2 * size:.1f}z",
        3: f"M{x:.1f} {y - 1.4 * size:.1f}l{1.4 * size:.1f} {1.4 * size:.1f}l{-1.4 * size:.1f} {1.4 * size:.1f}l{-1.4 * size:.1f} {-1.4 * size:.1f}z",
    }[shape]
    return f'<path class="mark" d="{path}"/>'


def _band(band: Sequence[tuple[float, float, float]], across: Scale, up: Scale, place: int) -> str:
    there = [f"{across.place(x):.1f},{up.place(high):.1f}" for x, _, high in band]
    back = [f"{across.place(x):.1f},{up.place(low):.1f}" for x, low, _ in reversed(band)]
    return f'<polygon class="band {style_of(place)}" points="{" ".join([*there, *back])}"/>'


def _event(x: float, text: str) -> str:
    right = x > WIDTH - RIGHT - LABEL * len(text)
    label = _text(x - 3, TOP + 9, text, "end", "small") if right else _text(x + 3, TOP + 9, text, "start", "small")
    return f'<g class="event"><path d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>{label}</g>'


def _swatch(place: int) -> str:
    dash = f' stroke-dasharray="{DASHES[place % len(DASHES)]}"' if DASHES[place % len(DASHES)] else ""
    sample = f'<g class="{style_of(place)}"><path class="line" d="M1 6H29"{dash}/>{_mark(15, 6, place, 3)}</g>'
    return f'<svg width="30" height="12" aria-hidden="true">{sample}</svg>'


def _axis_title(x: float, y: float, content: str) -> str:
    return _text(x, y, content, "middle", "axis-title")


def _text(x: float, y: float, content: str, anchor: str, kind: str = "") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{name}>{html.escape(content)}</text>'


def _short(label: str) -> str:
    return label if len(label) <= 28 else f"{label[:13]}…{label[-13:]}"


def _data(one: Scale) -> str:
    return f"{one.low!r},{one.high!r},{one.start},{one.stop},{int(one.log)},{int(one.whole)}"


def _svg(width: float, height: float, label: str, content: str, kind: str = "", more: str = "") -> str:
    named = html.escape(label, quote=True)
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{named}" class="chart{kind}"{more}>{content}</svg>'
