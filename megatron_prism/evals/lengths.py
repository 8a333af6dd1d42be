"""Scores by length of the context: tasks NAME-LENGTH as curves and as tables, for the report.

Owns: which tasks are one at several lengths; the mean at a length, over the tasks that are there at every length (so that a curve is of one set of
tasks), with the standard error of a mean of independent means.
"""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from megatron_prism.evals.chart import Axes, Point, lines

Results = Mapping[str, Any]
DOMAIN = "long context"


class Family(NamedTuple):
    """One task at several lengths: {length: its name there}, ascending."""

    name: str
    at: dict[int, str]


def families(results: Results) -> list[Family]:
    """The tasks that are there at two lengths or more."""
    found: dict[str, dict[int, str]] = {}
    for task, figures in next(iter(results["models"].values())).get("tasks", {}).items():
        name, _, length = task.rpartition("-")
        if figures.get("domain") == DOMAIN and name and length.isascii() and length.isdigit():
            found.setdefault(name, {})[int(length)] = task
    return [Family(name, dict(sorted(at.items()))) for name, at in found.items() if len(at) > 1]


def mean_at(found: Sequence[Family], scores: Mapping[str, Any]) -> list[Point]:
    """A model's mean accuracy in percent at each length that all tasks have."""
    shared = sorted(set.intersection(*(set(family.at) for family in found)))
    points = []
    for length in shared:
        figures = [scores[family.at[length]] for family in found]
        error = math.sqrt(sum(figure["standard_error"] ** 2 for figure in figures)) / len(figures)
        points.append(Point(length, 100 * sum(figure["accuracy"] for figure in figures) / len(figures), 100 * error))
    return points


def section(results: Results) -> str:
    """Curves of the mean over tasks, then each task by length, a table a model; empty where no task is there at two lengths."""
    found = families(results)
    if not found:
        return ""
    curves = {name: points for name, model in results["models"].items() if (points := mean_at(found, model["tasks"]))}
    tables = "\n".join(f"<h3>{html.escape(name)}</h3>\n{_table(found, model['tasks'])}" for name, model in results["models"].items())
    return f"<h2>By length</h2>\n{chart(curves, len(found)) if curves else ''}\n{tables}"


def chart(curves: Mapping[str, Sequence[Point]], num_tasks: int) -> str:
    """Mean accuracy by length, each doubling as wide as the next."""
    ticks = sorted({(point.x, f"{point.x:,.0f}") for line in curves.values() for point in line})
    label = f"accuracy, %, mean of {num_tasks} task{'s' * (num_tasks > 1)}"
    return lines(curves, Axes("tokens of prompt and answer", label, ticks, (0.0, 100.0), log_x=True))


def _table(found: Sequence[Family], scores: Mapping[str, Any]) -> str:
    every = sorted({length for family in found for length in family.at})
    rows = [(family.name, [_cell(scores, family.at.get(length)) for length in every]) for family in found]
    means = {point.x: f"{point.y:.1f}" for point in mean_at(found, scores)}
    rows.append(("mean", [means.get(length, "-") for length in every]))
    head = "".join(f"<th>{length:,}</th>" for length in every)
    body = "".join(f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>\n" for name, cells in rows)
    return f"<div class=scroll><table><thead><tr><th>accuracy, %</th>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"


def _cell(scores: Mapping[str, Any], task: str | None) -> str:
    return "-" if task is None else f"{100 * scores[task]['accuracy']:.1f}"
