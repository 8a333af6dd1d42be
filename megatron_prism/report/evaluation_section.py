"""The report's section on evaluation: every model that was scored, in one table a kind, with 95 % intervals and the paper's rows below.

An interval is Wilson's, for as many independent draws as the clustered standard error amounts to (all right or all wrong: the number of questions).
It stays within 0 and 100 % and is not empty at the ends. Owns: these intervals, and joining the scores of several evaluations.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from megatron_prism.evals.lengths import families, mean_at
from megatron_prism.evals.scores import paper_weights
from megatron_prism.report import chart, paper, parts
from megatron_prism.report.chart import Interval
from megatron_prism.report.curves import Curve
from megatron_prism.report.parts import Cell, Row
from megatron_prism.report.runs import Artifact
from megatron_prism.report.scales import Axis, number

Z = 1.959964
"""of a 95 % interval"""
DRAWN_TASKS = 12
Figures = Mapping[str, Any]
WIDE = 6
"""columns; in a table of more the intervals stand below"""
LENGTH_COLUMNS = ("ruler_8k", "ruler_16k", "ruler_32k", "ruler_64k", "ruler_128k")
MEANS = {"plain": "mean of tasks", "paper": "AVG (code, math, GPQA)"}


class Scored(NamedTuple):
    """A model in one evaluation."""

    name: str
    evaluation: str
    figures: Figures
    means: Mapping[str, float | None]


def section(every: Sequence[Artifact], model: str | None) -> str:
    """model: the paper's, whose rows stand below."""
    evaluations = in_order(every)
    scored = [entry for one in evaluations for entry in _scored(one, len(evaluations) > 1)]
    tasks = list(dict.fromkeys(task for entry in scored for task in entry.figures.get("tasks", {})))
    short = [task for task in tasks if not _is_by_length(task, scored)]
    printed = paper.rows(model, [*short, "code", "math", "average", "plain_mean"]) if model else []
    content = [
        _accuracy(scored, short, printed, model),
        _drawn(scored, short),
        _lengths(evaluations, model),
        _perplexity(scored),
        parts.notes(_unlike(evaluations)),
    ]
    return parts.section("evaluation", "Evaluation", content) if scored else ""


def in_order(every: Sequence[Artifact]) -> list[Artifact]:
    """The evaluations, by the last of the models that each asked: a model's stands behind that of the model that it was made from."""
    places = {id(one): place for place, one in enumerate(every)}
    found = [one for one in every if one.kind == "evaluate" and one.is_shown]
    return sorted(found, key=lambda one: max((places[id(link.artifact)] for link in one.parents), default=places[id(one)]))


def interval(accuracy: float, standard_error: float, questions: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy; all of them shares of 1."""
    spread = accuracy * (1 - accuracy)
    draws = spread / standard_error**2 if standard_error > 0 and spread > 0 else float(questions)
    middle = (accuracy + Z**2 / (2 * draws)) / (1 + Z**2 / draws)
    half = Z / (1 + Z**2 / draws) * math.sqrt(spread / draws + Z**2 / (4 * draws**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def _scored(one: Artifact, several: bool) -> list[Scored]:
    results = one.read_json("scores.json")
    means = results.get("averages", {})
    return [
        Scored(f"{name} ({one.name})" if several else name, one.name, figures, means.get(name, {})) for name, figures in results["models"].items()
    ]


def _accuracy(scored: Sequence[Scored], tasks: Sequence[str], printed: Sequence[paper.Printed], model: str | None) -> str:
    """A row a model, a column a task."""
    if not tasks:
        return ""
    means = [key for key in MEANS if any(entry.means.get(key) is not None for entry in scored) and len(tasks) > 1]
    extra = [column for column in ("code", "math", "average") if any(column in row.values for row in printed)]
    head = ["accuracy, %", *map(_named, tasks), *(MEANS[key] for key in means), *(f"paper's {column}" for column in extra)]
    rows: list[Row] = []
    for entry in scored:
        found = entry.figures.get("tasks", {})
        cells = [_score(found.get(task)) for task in tasks] + [_mean(entry, key) for key in means]
        rows.append(Row([entry.name, *cells, *("" for _ in extra)]))
    for row in printed:
        cells = [_printed(row, column) for column in tasks] + [Cell("") for _ in means] + [_printed(row, column) for column in extra]
        rows.append(Row([row.name, *cells], "paper"))
    said = ["Small: 95 % intervals; Wilson's, for as many draws as the standard error, clustered by question, amounts to; of means the normal one."]
    if printed:
        said += paper.notes(printed)
    elif model is None:
        said.append("No model here has the shape of one of the paper's seven; --paper MODEL puts a model's rows beside these.")
    return parts.table(head, rows, "accuracy by model and task", dense=len(head) > WIDE) + parts.notes(said)


def _printed(row: paper.Printed, column: str) -> Cell:
    value = row.values.get(column)
    return Cell("-" if value is None else f"{value:.2f}", paper.MISPRINT if column in row.misprints else "")


def _score(found: Figures | None) -> Cell:
    if found is None:
        return Cell("-")
    low, high = interval(found["accuracy"], found["standard_error"], found["num_questions"])
    return Cell(f"{100 * found['accuracy']:.1f}", f"{100 * low:.1f} to {100 * high:.1f}")


def _mean(entry: Scored, key: str) -> Cell:
    """A mean over tasks; its standard error is that of a weighted mean of independent ones."""
    value, tasks = entry.means.get(key), entry.figures.get("tasks", {})
    if value is None:
        return Cell("-")
    weights = paper_weights(tasks) if key == "paper" else dict.fromkeys(tasks, 1 / len(tasks))
    error = math.sqrt(sum((weight * tasks[task]["standard_error"]) ** 2 for task, weight in (weights or {}).items()))
    return Cell(f"{100 * value:.1f}", f"{max(0.0, 100 * (value - Z * error)):.1f} to {min(100.0, 100 * (value + Z * error)):.1f}")


def _drawn(scored: Sequence[Scored], tasks: Sequence[str]) -> str:
    """A picture a task."""
    figures = []
    for task in tasks:
        rows = []
        for place, entry in enumerate(scored):
            found = entry.figures.get("tasks", {}).get(task)
            if found is not None:
                low, high = interval(found["accuracy"], found["standard_error"], found["num_questions"])
                rows.append(Interval(entry.name, 100 * found["accuracy"], 100 * low, 100 * high, place))
        sizes = {row["num_questions"] for entry in scored if (row := entry.figures.get("tasks", {}).get(task))}
        title = f"{_named(task)} ({', '.join(f'{size:,}' for size in sorted(sizes))} questions)"
        figures.append(parts.figure(title, chart.intervals(rows, Axis("accuracy, %, with its 95 % interval", (0.0, 100.0)), task)))
    return parts.grid(figures[:DRAWN_TASKS]) + parts.fold(f"{len(figures) - DRAWN_TASKS} more tasks", [parts.grid(figures[DRAWN_TASKS:])])


def _perplexity(scored: Sequence[Scored]) -> str:
    """Perplexity and bits per byte by domain."""
    tables = [(entry, found) for entry in scored if (found := entry.figures.get("perplexity", {}).get("domains", {}))]
    domains = list(dict.fromkeys(domain for _, found in tables for domain in found))
    if not domains:
        return ""
    faces = (("perplexity", lambda found: number(found["perplexity"])), ("bits per byte", lambda found: f"{found['bits_per_byte']:.3f}"))
    shown = []
    for label, face in faces:
        rows = [
            [entry.name, *("-" if found.get(domain, {}).get(label.replace(" ", "_")) is None else face(found[domain]) for domain in domains)]
            for entry, found in tables
        ]
        shown.append(f"<div>{parts.table([label, *domains], rows, f'{label} by domain')}</div>")
    return (
        parts.heading("Held-out text")
        + parts.grid(shown)
        + parts.paragraph("Perplexities compare models of one tokenizer; bits per byte compare any.")
    )


def _is_by_length(task: str, scored: Sequence[Scored]) -> bool:
    return any(entry.figures["tasks"][task].get("domain") == "long context" for entry in scored if task in entry.figures.get("tasks", {}))


def _lengths(evaluations: Sequence[Artifact], model: str | None) -> str:
    """RULER by length: a curve a model, its 95 % interval shaded, the paper's Table 7 for its model."""
    figures = []
    for one in evaluations:
        results = one.read_json("scores.json")
        found = families(results)
        if not found:
            continue
        points = {name: mean_at(found, scores["tasks"]) for name, scores in results["models"].items()}
        curves = [Curve(name, [(point.x, point.y) for point in line], len(line)) for name, line in points.items()]
        bands = [[(p.x, max(0.0, p.y - Z * p.error), min(100.0, p.y + Z * p.error)) for p in line] for line in points.values()]
        for row in paper.rows(model, LENGTH_COLUMNS) if model == "granite-3.3-8b" else []:
            known = [(1024.0 * int(column[6:-1]), value) for column, value in row.values.items() if value is not None]
            curves.append(Curve(row.name, known, len(known)))
        lengths = tuple(sorted({x for curve in curves for x, _ in curve.points}))
        axis = Axis("tokens of prompt and answer (each doubling equally wide)", log=True, at=lengths)
        drawn = chart.lines(curves, axis, Axis("accuracy, %", (0.0, 100.0)), bands=bands)
        said = f"Mean of {len(found)} tasks at each length; shaded: 95 % interval (normal)."
        figures.append(parts.figure(f"By length of the context ({one.name})", drawn, said, chart.legend([curve.name for curve in curves])))
    return parts.grid(figures)


def asked(one: Artifact) -> Figures:
    """What an evaluation asked, and how."""
    return {key: one.config.get(key) or {} for key in ("tasks", "generation")}


def _unlike(evaluations: Sequence[Artifact]) -> list[str]:
    """Evaluations that asked otherwise are not to be compared."""
    settings = [(one.name, asked(one)) for one in evaluations]
    found = []
    for name, own in settings[1:]:
        other = [key for key in own if own[key] != settings[0][1][key]]
        found += [f"{name} asked with other settings than {settings[0][0]} ({', '.join(other)}): compare with care."] if other else []
    return found


def _named(task: str) -> str:
    return task.replace("_", " ")
