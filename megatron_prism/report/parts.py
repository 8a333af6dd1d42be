"""The pieces of the page that are the report's own: figures with captions, tables, folds, warnings, durations. Owns: escaping."""

import html
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import NamedTuple

from megatron_prism.analysis.markup import notes, paragraph, words
from megatron_prism.report import chart
from megatron_prism.report.curves import Curve
from megatron_prism.report.scales import Axis

__all__ = ["Cell", "figure", "fold", "grid", "lines", "notes", "paragraph", "seconds", "section", "table", "warning"]


class Cell(NamedTuple):
    """A cell of a table. small: stands beside the text, fainter. wrap: a text that may take several lines."""

    text: str
    small: str = ""
    wrap: bool = False


class Row(NamedTuple):
    """A row. kind: paper (a figure that is not ours) or group (a heading)."""

    cells: Sequence[str | Cell]
    kind: str = ""


def section(anchor: str, title: str, parts: Iterable[str]) -> str:
    """A heading that the page's contents lead to, and what stands under it; empty where that is nothing."""
    content = "\n".join(part for part in parts if part)
    return f'<section><h2 id="{anchor}">{html.escape(title)}</h2>\n{content}\n</section>' if content else ""


def heading(text: str, anchor: str = "") -> str:
    """A heading within a section."""
    return f"<h3{f' id={chr(34)}{anchor}{chr(34)}' if anchor else ''}>{html.escape(text)}</h3>"


def table(head: Sequence[str], rows: Sequence[Sequence[str | Cell] | Row], label: str, dense: bool = False) -> str:
    """The first cell of a row is its name. label: what it shows, for those who hear the page. dense: small texts stand below the others."""
    named = [row if isinstance(row, Row) else Row(row) for row in rows]
    kinds = [_kind(row.cells[place] for row in named if row.kind != "group" and place < len(row.cells)) for place in range(len(head))]
    columns = "".join(f'<th scope="col"{kind}>{html.escape(name)}</th>' for name, kind in zip(head, kinds, strict=True))
    body = "".join(_row(row, kinds) for row in named)
    inner = f"<table{' class=dense' if dense else ''}><thead><tr>{columns}</tr></thead><tbody>\n{body}</tbody></table>"
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{html.escape(label, quote=True)}">{inner}</div>'


def _kind(column: Iterable[str | Cell]) -> str:
    """The class of a column's cells: words are read from their left, numbers stand under each other."""
    cells = [cell if isinstance(cell, Cell) else Cell(cell) for cell in column]
    return " class=text" if any(cell.wrap for cell in cells) or words(cell.text for cell in cells) else ""


def _row(row: Row, kinds: Sequence[str]) -> str:
    """A heading goes over all columns."""
    first, *others = (cell if isinstance(cell, Cell) else Cell(cell) for cell in row.cells)
    cells = "".join(f"<td{' class=wrap' if cell.wrap else kind}>{_cell(cell)}</td>" for cell, kind in zip(others, kinds[1:], strict=False))
    over = f" colspan={len(kinds)}" if row.kind == "group" and not others else ""
    return f'<tr{f" class={row.kind}" if row.kind else ""}><th scope="row"{over}>{_cell(first)}</th>{cells}</tr>\n'


def _cell(cell: Cell) -> str:
    return html.escape(cell.text) + (f"<small>{html.escape(cell.small)}</small>" if cell.small else "")


def figure(title: str, drawn: str, caption: str = "", key: str = "") -> str:
    """A picture with its title above and what has to be known below; empty for no picture."""
    said = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f"<figure><h4>{html.escape(title)}</h4>{key}{drawn}{said}</figure>" if drawn else ""


def lines(
    title: str, curves: Sequence[Curve], x: Axis, y: Axis, marks: Sequence[chart.Mark] = (), caption: str = "", with_legend: bool = True
) -> str:
    """A figure of curves. Says so where an axis is logarithmic, where points were left out, and where values were no numbers."""
    said = [*([caption] if caption else []), *_logarithmic(curves, x, y)]
    if any(one.is_thinned for one in curves):
        said.append("Thinned: the lowest and the highest value of each stretch are kept.")
    strange = sum(one.strange for one in curves)
    if strange:
        said.append(f"{strange:,} values that are no finite numbers are left out.")
    key = chart.legend([one.name for one in curves]) if with_legend and len(curves) > 1 else ""
    return figure(title, chart.lines(curves, x, y, marks), " ".join(said), key)


def _logarithmic(curves: Sequence[Curve], x: Axis, y: Axis) -> list[str]:
    """Which axes are, as they are drawn; none of a figure without points."""
    points = [point for one in curves for point in one.points]
    drawn = [
        name for place, (axis, name) in enumerate(((x, "horizontal"), (y, "vertical"))) if axis.is_logarithmic([point[place] for point in points])
    ]
    return [f"The {name} axis is logarithmic: each factor of ten is as wide as the next." for name in drawn] if points else []


def grid(figures: Iterable[str]) -> str:
    """Figures side by side where there is room."""
    found = [one for one in figures if one]
    return f'<div class="grid">{"".join(found)}</div>' if found else ""


def fold(summary: str, parts: Iterable[str], printed: bool = True) -> str:
    """What is there for those who ask. printed: open on paper; else not there."""
    content = "\n".join(part for part in parts if part)
    return f'<details class="fold{"" if printed else " unprinted"}"><summary>{html.escape(summary)}</summary>\n{content}</details>' if content else ""


def warning(texts: Sequence[str]) -> str:
    """What a reader must not miss."""
    return f'<div class="warn">{"".join(paragraph(text) for text in texts)}</div>' if texts else ""


def seconds(value: float | None) -> str:
    """A duration for people."""
    if value is None:
        return "-"
    if value < 100:
        return f"{value:.0f} s"
    minutes = round(value / 60)
    if minutes < 100:
        return f"{int(value) // 60} min {int(value) % 60:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def moment(text: str) -> str:
    """A recorded time, to the minute."""
    return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M} UTC" if text else "-"
