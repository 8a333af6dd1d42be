"""Scores of several models side by side: the rows of one table, and its two faces (terminal, markdown).

Owns: which figures are shown and how they are rounded. scores.json has them all, unrounded.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Scores = Mapping[str, Mapping[str, Any]]


class Row(NamedTuple):
    """A figure, and its text for each model."""

    label: str
    cells: tuple[str, ...]


def rows(scores: Scores) -> list[Row]:
    """The table of {model: {"perplexity": {"domains": ...}, "tasks": ...}}: perplexity (and bits per byte) by domain, then accuracy by task.

    From the second model on, a perplexity carries its change against the first.
    """
    first = next(iter(scores.values()))
    domains = list(first.get("perplexity", {}).get("domains", {}))
    found = [Row(f"{domain}: perplexity", _perplexities(scores, domain)) for domain in domains]
    found += [Row(f"{domain}: bits per byte", _bits(scores, domain)) for domain in domains]
    tasks = list(first.get("tasks", {}))
    found += [Row(f"{task}: accuracy, %", tuple(_accuracy(model["tasks"][task]) for model in scores.values())) for task in tasks]
    if len(tasks) > 1:
        found.append(Row("mean accuracy, %", tuple(_mean_accuracy(model["tasks"]) for model in scores.values())))
    return found


def markdown(scores: Scores) -> str:
    """The table for a page."""
    lines = [["", *scores], ["---"] + ["---:"] * len(scores), *([row.label, *row.cells] for row in rows(scores))]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def show(scores: Scores, title: str) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("")
    for model in scores:
        table.add_column(model, justify="right", no_wrap=True)
    sections = rows(scores)
    for row, following in zip(sections, [*sections[1:], None], strict=True):
        table.add_row(row.label, *row.cells, end_section=following is not None and _kind(row) != _kind(following))
    Console().print(table)


def _kind(row: Row) -> str:
    return row.label.rpartition(": ")[2].removeprefix("mean ")


def _perplexities(scores: Scores, domain: str) -> tuple[str, ...]:
    values = [model["perplexity"]["domains"][domain]["perplexity"] for model in scores.values()]
    return tuple(f"{value:.3g}" if place == 0 else f"{value:.3g} ({value / values[0] - 1:+.1%})" for place, value in enumerate(values))


def _bits(scores: Scores, domain: str) -> tuple[str, ...]:
    values = [model["perplexity"]["domains"][domain]["bits_per_byte"] for model in scores.values()]
    return tuple("-" if value is None else f"{value:.3f}" for value in values)


def _accuracy(task: Mapping[str, Any]) -> str:
    return f"{100 * task['accuracy']:.1f} ± {100 * task['standard_error']:.1f}"


def _mean_accuracy(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """The plain mean over tasks; errors of independent tasks add in squares."""
    mean = sum(task["accuracy"] for task in tasks.values()) / len(tasks)
    error = sum(task["standard_error"] ** 2 for task in tasks.values()) ** 0.5 / len(tasks)
    return _accuracy({"accuracy": mean, "standard_error": error})


def summary(scores: Scores) -> Sequence[str]:
    """Lines about completions that were no answers, so that a low accuracy is not taken for a lack of knowledge."""
    lines = []
    for model, found in scores.items():
        for task, figures in found.get("tasks", {}).items():
            named = {"gave no answer": "no_answer", "ran into max_new_tokens": "truncated", "made the grader fail": "grader_failed"}
            shares = [f"{figures[key]:.0%} {label}" for label, key in named.items() if figures[key] >= 0.005]
            lines += [f"{model}, {task}: {', '.join(shares)}"] if shares else []
    return lines
