"""The page of how models answer: one HTML file that needs nothing but itself. Owns: its order, its pictures, what is said beside the figures."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_prism.analysis import behaviour_table, heatmap, markup
from megatron_prism.analysis.behaviour_table import Results
from megatron_prism.analysis.pictures import COLOURS
from megatron_prism.evals.chart import Axes, Point, lines

SPLIT = {"all responses": "neg_logprob", "correct": "neg_logprob_correct", "incorrect": "neg_logprob_incorrect"}
BAR, GAP, LEFT, WIDTH = 14, 4, 220, 420
LENGTH_TICKS = 8
CHANCE = (
    "By chance: how many questions would have moved so between two models that solve each question equally often, given all right answers that were "
    "seen. A question with no right sample of n may still be solved once in 50 times, so some are solved anew without any learning."
)
AFTER_FILTER = (
    "Prompts were chosen by having so few right samples, and some of them had bad luck: their pass rate is higher from the first step on. The change "
    "that RL made is that along the curve, not that from the filter's count to its first point. Each step asks other prompts."
)


def page(results: Results) -> str:
    """The whole page."""
    caveats = [f"Paper, {results['paper']['table']}: {text}" for text in results["paper"]["caveats"]] if results["paper"] else []
    moved = [row["transitions"] for pair in results["pairs"] for row in pair["rows"] if row["transitions"]]
    chance = [CHANCE] if any(one["expected"] for one in moved) else []
    body = [markup.notes([behaviour_table.LEGEND, *chance, *results["notes"], *caveats])]
    body.append(
        markup.table(["model", "evaluation", "its name there"], [[one["name"], one["evaluation"], one["entry"]] for one in results["models"]])
    )
    body += [_task(results, task) for task in results["tasks"]]
    if len(results["tasks"]) > 1:
        body.append(markup.section("Mean of tasks", [*_tables(results, None), _split(results, None)]))
    if results["rl"]:
        body.append(_course(results["rl"]))
    return markup.document("How the models answer", body)


def _task(results: Results, task: str) -> str:
    parts = [*_tables(results, task), _lengths(results, task), _split(results, task)]
    if results["pairs"]:
        head, solved = behaviour_table.SOLVED_HEAD, list(behaviour_table.solved(results, task))
        parts += ["<h3>Questions solved in some sample</h3>", markup.table(head, solved)]
        found = [(pair, next(row["transitions"] for row in pair["rows"] if row["task"] == task)) for pair in results["pairs"]]
        parts += [matrix(pair["start"], pair["end"], transitions) for pair, transitions in found]
    return markup.section(task, parts)


def _tables(results: Results, task: str | None) -> list[str]:
    found = [markup.table(behaviour_table.HEAD, list(behaviour_table.rows(results, task)))]
    if results["pairs"]:
        found.append(markup.table(behaviour_table.CHANGE_HEAD, list(behaviour_table.changes(results, task))))
    return found


def matrix(start: str, end: str, found: Results) -> str:
    """Questions by right samples at the start (up) and at the end (across); found: the transitions between two models."""
    rows, columns = ([f"{right}/{samples}" for right in range(samples + 1)] for samples in found["samples"])
    labels = heatmap.Labels(f"right samples of {end}", f"right samples of {start}", "questions")
    counts = [[count or None for count in row] for row in found["counts"]]  # an empty cell says 0 better than a colour does
    return heatmap.cells(counts, columns, rows, labels, shown=lambda count: f"{count:.0f}")


def _lengths(results: Results, task: str) -> str:
    """Share of each model's responses by length."""
    found = next(one for one in results["lengths"] if one["task"] == task)
    edges = found["edges"]
    series = {
        name: [Point((low + high - 1) / 2, 100 * count / max(1, sum(counts))) for low, high, count in zip(edges, edges[1:], counts, strict=False)]
        for name, counts in found["counts"].items()
    }
    ticks = [(edge, f"{edge:g}") for edge in edges[:: -(-len(edges) // LENGTH_TICKS)]]
    width = edges[1] - edges[0]
    shown = f"responses, % (each point: {width:g} token{'s' * (width != 1)})"
    highest = max(point.y for points in series.values() for point in points)
    return lines(series, Axes("tokens of a response", shown, ticks, (0.0, 1.05 * highest)), COLOURS)


def _split(results: Results, task: str | None) -> str:
    """-log p of all, of correct and of incorrect responses: a bar with its interval for each model."""
    found = [row for row in results["rows"] if row["task"] == task]
    known = [(kind, row["model"], row["figures"][name]) for kind, name in SPLIT.items() for row in found]
    ends = [value for _, _, one in known if one for value in (one["value"], one["high"]) if value is not None]
    if not ends:
        return ""
    scale, models = WIDTH / (max(ends) or 1.0), [row["model"] for row in found]
    marks, y = [], 22
    for kind in SPLIT:
        marks.append(heatmap.text(LEFT - 8, y + BAR - 2, kind, "end"))
        for name, one in ((model, one) for which, model, one in known if which == kind):
            marks.append(_bar(name, one, scale, y, COLOURS[models.index(name) % len(COLOURS)]))
            y += BAR + GAP
        y += 3 * GAP
    label = "-log p of sampled tokens, nats (no entropy); whiskers: 95 % intervals"
    marks.append(heatmap.text(4, 12, label, "start"))
    size = f'viewBox="0 0 {LEFT + WIDTH + 200} {y}" width="{LEFT + WIDTH + 200}" height="{y}"'
    described = html.escape(label, quote=True)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{described}" font-family="sans-serif">{"".join(marks)}</svg>'


def _bar(model: str, found: Mapping[str, float | None] | None, scale: float, y: int, colour: str) -> str:
    text = f"{model}: {behaviour_table.cell('neg_logprob', found)}"
    if found is None:
        return heatmap.text(LEFT + 6, y + BAR - 2, text, "start")
    value, low, high = found["value"] or 0.0, found["low"], found["high"]
    bar = f'<rect x="{LEFT}" y="{y}" width="{max(0.0, scale * value):.1f}" height="{BAR}" fill="{colour}"/>'
    whisker = "" if low is None or high is None else _whisker(LEFT + scale * low, LEFT + scale * high, y + BAR / 2)
    return bar + whisker + heatmap.text(LEFT + scale * max(value, high or 0.0) + 6, y + BAR - 2, text, "start")


def _whisker(start: float, end: float, y: float) -> str:
    return f'<line x1="{start:.1f}" x2="{end:.1f}" y1="{y}" y2="{y}" stroke="currentColor" stroke-width="1.5"/>'


def _course(rl: Results) -> str:
    """Pass rate by step, a line for each count of the filter; of all domains together, and of each."""
    parts = [markup.paragraph(AFTER_FILTER), markup.table(behaviour_table.COURSE_HEAD, list(behaviour_table.course(rl)))]
    for domain in dict.fromkeys(curve["domain"] for curve in rl["curves"]):
        curves = [curve for curve in rl["curves"] if curve["domain"] == domain]
        series = {f"{behaviour_table.course_label(curve, rl['samples'])} in the filter": _points(curve["points"]) for curve in curves}
        steps = sorted({point["step"] for curve in curves for point in curve["points"]})
        ticks = [(float(step), str(step)) for step in steps[:: -(-len(steps) // heatmap.TICKS)]]
        ends = [100 * (point["high"] or point["pass_rate"]) for curve in curves for point in curve["points"]]
        label = "right responses, % (whiskers: about one standard error)"
        parts.append(lines(series, Axes("step", label, ticks, (min(0.0, _lowest(series)), 1.05 * max(*ends, 1.0))), COLOURS))
    return markup.section("Hard prompts through RL", parts)


def _points(points: Sequence[Mapping[str, Any]]) -> list[Point]:
    """With a quarter of an interval's width above and below, which is about a standard error."""
    return [Point(one["step"], 100 * one["pass_rate"], 100 * _error(one["low"], one["high"])) for one in points]


def _error(low: float | None, high: float | None) -> float:
    return 0.0 if low is None or high is None else (high - low) / 4


def _lowest(series: Mapping[str, Sequence[Point]]) -> float:
    return min((point.y - point.error for points in series.values() for point in points), default=math.inf)
