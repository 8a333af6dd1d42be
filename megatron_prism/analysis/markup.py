"""The pieces that every page of an analysis is made of: one HTML file that needs nothing but itself. Owns: escaping, the frame, sections, tables."""

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_prism.evals.report_page import STYLE


def document(title: str, parts: Sequence[str]) -> str:
    """The whole page."""
    head = f'<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>'
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n<style>\n{STYLE}</style>\n</head>\n<body>\n'
        f"<h1>{html.escape(title)}</h1>\n" + "\n".join(part for part in parts if part) + "\n</body>\n</html>\n"
    )


def section(title: str, parts: Sequence[str]) -> str:
    """A heading and what stands under it."""
    return f"<h2>{html.escape(title)}</h2>\n" + "\n".join(part for part in parts if part)


def paragraph(text: str) -> str:
    """Text."""
    return f"<p>{html.escape(text)}</p>"


def notes(lines: Sequence[str]) -> str:
    """What has to be known to read the page; empty for no lines."""
    return f'<ul class="notes">{"".join(f"<li>{html.escape(line)}</li>" for line in lines)}</ul>' if lines else ""


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The first cell of a row is its name; two spaces in it indent."""
    kinds = [" class=text" if words(str(cells[place]) for cells in rows) else "" for place in range(len(head))]
    columns = "".join(f"<th{kind}>{html.escape(name)}</th>" for name, kind in zip(head, kinds, strict=True))
    body = ""
    for first, *others in rows:
        cells = "".join(f"<td{kind}>{html.escape(str(cell))}</td>" for cell, kind in zip(others, kinds[1:], strict=True))
        body += f"<tr><th>{html.escape(first).replace('  ', '&emsp;')}</th>{cells}</tr>\n"
    return f"<div class=scroll><table><thead><tr>{columns}</tr></thead><tbody>\n{body}</tbody></table></div>"


def words(column: Iterable[str]) -> bool:
    """Whether the cells of a column are to be read from their left, as words are: none of them is a number, and some are there."""
    found = [cell for cell in column if cell not in ("", "-", "?")]
    return bool(found) and not any(re.match(r"[+<>≤-]?\.?\d", cell) for cell in found)
