"""The report's sections on representations (cka.json), behaviour (behaviour.json) and the landscape of scores between models (landscape.json).

Drawn from those files; nothing is measured here.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_prism.analysis import heatmap
from megatron_prism.analysis.behaviour_page import matrix
from megatron_prism.analysis.behaviour_table import by_chance, number, with_ends
from megatron_prism.analysis.cka_page import number as four_digits
from megatron_prism.analysis.cka_page import with_spread
from megatron_prism.report import chart, parts
from megatron_prism.report.chart import Mark
from megatron_prism.report.curves import Curve
from megatron_prism.report.parts import Cell, Row
from megatron_prism.report.runs import Artifact
from megatron_prism.report.scales import STEPS, Axis

Results = Mapping[str, Any]
FIGURES = {
    "pass_rate": "right, %",
    "median_tokens": "median tokens",
    "neg_logprob": "-log p a token, nats",
    "neg_logprob_correct": "of right responses",
    "neg_logprob_incorrect": "of wrong responses",
}
"""of a behaviour: heading"""
LARGEST_MAP = 17
"""samples a question up to which solvability is drawn as a map"""


def representations(every: Sequence[Artifact]) -> str:
    """CKA by layer, each pair over its sets of inputs."""
    found = [one.read_json("cka.json") for one in every if one.kind == "cka" and one.is_shown]
    drawn = [_alike(pair) for results in found for pair in results["pairs"]]
    said = [_how(results) for results in found]
    caveats = [f"Paper, {text}" for results in found for pair in results["pairs"] if pair["paper"] for text in pair["paper"]["caveats"]]
    return parts.section("cka", "Representations", [parts.grid(drawn), parts.notes(list(dict.fromkeys([*said, *caveats])))] if drawn else [])


def _how(results: Results) -> str:
    """What the curves are."""
    draws, centred = results["bootstrap"], "centred" if results["centred"] else "not centred"
    return (
        f"Linear CKA of hidden states, mean-pooled over tokens, {centred}; shaded: the lowest and the highest of {draws['draws']} draws of "
        f"{draws['size']} inputs. Point 0 is the embedding, the last one {results['last_point']}. Shuffled: at that layer, one model's inputs in "
        "another order; it is what representations have that share nothing, and a CKA says something by its distance from it."
    )


def _alike(pair: Results) -> str:
    """One pair: curves by layer, and the least value of each set."""
    curves, bands, rows = [], [], []
    printed = (pair["paper"] or {}).get("min", {})
    for each in pair["sets"]:
        known = [point for point in each["points"] if point["mean"] is not None]
        curves.append(Curve(each["set"], [(point["point"], point["mean"]) for point in known], len(known)))
        bands.append([(point["point"], point["low"], point["high"]) for point in known])
        least = each["min"]
        cells = ["-", "-", "-"]
        if least is not None:
            cells = [with_spread(least["mean"], least["std"]), str(least["point"]), four_digits(each["points"][least["point"]].get("shuffled"))]
        rows.append([each["set"], *cells, *([f"{printed[each['set']]:.4f}" if each["set"] in printed else "-"] if printed else [])])
    drawn = chart.lines(curves, Axis("layer (0: embedding)", whole=True), Axis("CKA"), bands=bands)
    head = ("inputs", "least over layers", "at layer", "shuffled", *(("paper's least",) if printed else ()))
    return parts.figure(pair["label"], drawn, key=chart.legend([curve.name for curve in curves])) + parts.table(head, rows, f"CKA, {pair['label']}")


def behaviour(every: Sequence[Artifact]) -> str:
    """How models answer, and which questions changed sides."""
    content = [_behaviour(one.read_json("behaviour.json")) for one in every if one.kind == "behaviour" and one.is_shown]
    return parts.section("behaviour", "Behaviour", content)


def _behaviour(results: Results) -> str:
    head = ("", *FIGURES.values())
    rows: list[Row] = []
    for task in dict.fromkeys(row["task"] for row in results["rows"]):
        rows.append(Row([_task(task)], "group"))
        rows += [Row([row["model"], *(_figure(row["figures"].get(key), key) for key in FIGURES)]) for row in results["rows"] if row["task"] == task]
    printed = results["paper"]
    for name, figures in (printed or {"rows": {}})["rows"].items():
        cells = [number(key, figures.get(key)) for key in FIGURES]
        rows.append(Row([f"paper {printed['table']}, {printed['task']}: {name}", *cells], "paper"))
    said = [*results["notes"], *(f"Paper, {text}" for text in (printed or {"caveats": []})["caveats"])]
    intervals = f"Small figures: {100 * results['confidence']:.0f} % intervals of a bootstrap over questions. *: 0 lies outside that of a change."
    drawn = parts.grid([*_transitions(results["pairs"]), *_lengths(results["lengths"]), _while_trained(results["rl"])])
    changed = _changes(results["pairs"])
    return parts.table(head, rows, "behaviour by model and task") + changed + drawn + parts.notes([intervals, *said])


def _changes(pairs: Sequence[Results]) -> str:
    """From model to model, with a star where 0 lies outside the interval."""
    rows: list[Row] = []
    for pair in pairs:
        rows.append(Row([f"{pair['start']} to {pair['end']}"], "group"))
        rows += [Row([_task(row["task"]), *(_difference(row["figures"].get(key), key) for key in FIGURES)]) for row in pair["rows"]]
    head = ("change", *FIGURES.values())
    return parts.heading("Changes") + parts.table(head, rows, "changes of behaviour") if rows else ""


def _difference(found: Results | None, key: str) -> Cell:
    if found is None:
        return Cell("-")
    value, ends = with_ends(key, found, "difference", is_signed=True)
    return Cell(f"{value}{' *' if found['is_difference'] else ''}", " to ".join(ends))


def _figure(found: Results | None, key: str) -> Cell:
    if found is None:
        return Cell("-")
    value, ends = with_ends(key, found, "value")
    return Cell(value, " to ".join(ends))


def _transitions(pairs: Sequence[Results]) -> list[str]:
    """Questions by how often they were solved before and after."""
    figures = []
    for pair in pairs:
        for row in pair["rows"]:
            found = row["transitions"]
            if found is None:
                continue
            title = f"{_task(row['task'])}: {pair['start']} to {pair['end']}"
            newly, lost = by_chance(found)
            chance = f"; by chance alone {newly} and {lost} would change sides" if found["expected"] else ""
            said = f"{found['newly_solved']} newly solved, {found['lost']} lost, {found['kept']} kept, {found['never']} never solved{chance}."
            is_small = max(found["samples"]) < LARGEST_MAP
            drawn = matrix(pair["start"], pair["end"], found) if is_small else parts.paragraph("Too many samples a question for a map.")
            figures.append(parts.figure(title, drawn, said))
    return figures


def _lengths(lengths: Sequence[Results]) -> list[str]:
    """Responses by their length, as shares of a model's."""
    figures = []
    for each in lengths:
        curves = []
        for model, counts in each["counts"].items():
            total = sum(counts) or 1
            points = [((low + high) / 2, 100 * count / total) for low, high, count in zip(each["edges"], each["edges"][1:], counts, strict=False)]
            curves.append(Curve(model, points, len(points)))
        figures.append(parts.lines(f"Length of responses: {_task(each['task'])}", curves, Axis("tokens (middle of a class)"), Axis("responses, %")))
    return figures


def _while_trained(rl: Results | None) -> str:
    """During RL: prompts by how often the filter's model solved them."""
    if not rl:
        return ""
    overall = [curve for curve in rl["curves"] if curve["domain"] is None] or rl["curves"]
    curves = [
        Curve(
            " ".join(filter(None, [curve["domain"], f"{curve['right']} of {rl['samples']}"])),
            [(point["step"], 100 * point["pass_rate"]) for point in curve["points"]],
            len(curve["points"]),
        )
        for curve in overall
    ]
    caption = "By how many of the filter's samples were right before training."
    return parts.lines("Pass rate in training by solvability", curves, STEPS, Axis("right responses, %"), caption=caption)


def landscape(every: Sequence[Artifact]) -> str:
    """Scores on a path through the models, and on a grid between them."""
    content = [_landscape(one.read_json("landscape.json")) for one in every if one.kind == "landscape" and one.is_shown]
    said = "W(alpha, beta) = base + alpha (mid-trained - base) + beta (RL - mid-trained). Shaded: two standard errors."
    return parts.section("landscape", "Landscape", [*content, parts.notes([said])] if content else [])


def _landscape(results: Results) -> str:
    return parts.grid([figure for each in results["figures"] for figure in (_path(results, each), _grid(results, each))])


def _path(results: Results, figure: Results) -> str:
    if not results["path"]:
        return ""
    found = [(stop["position"], results["points"][stop["point"]]["scores"].get(figure["name"])) for stop in results["path"]]
    known = [(x, score) for x, score in found if score is not None]
    points = [(x, figure["factor"] * score["value"]) for x, score in known]
    errors = [(x, figure["factor"] * score["value"], 2 * figure["factor"] * score["error"]) for x, score in known if score["error"] is not None]
    share = (0.0, 100.0) if figure["factor"] == 100 else None
    low, high = share or (-math.inf, math.inf)
    band = [(x, max(low, at - error), min(high, at + error)) for x, at, error in errors]
    names = [model["name"] for model in results["models"]]
    marks = [Mark(float(place), name) for place, name in enumerate(names)]
    label = ", ".join(f"{place} {name}" for place, name in enumerate(names))
    drawn = chart.lines(
        [Curve(figure["label"], points, len(points))], Axis(f"place on the path ({label})"), Axis(figure["label"], share), marks, bands=[band]
    )
    return parts.figure(f"Along the path: {figure['label']}", drawn)


def _grid(results: Results, figure: Results) -> str:
    grid = results["grid"]
    if not grid:
        return ""

    def value(point: int) -> float | None:
        score = results["points"][point]["scores"].get(figure["name"])
        return None if score is None else figure["factor"] * score["value"]

    values = [[value(point) for point in row] for row in grid["points"]]
    labels = heatmap.Labels("alpha", "beta", figure["label"])
    drawn = heatmap.cells(values, [f"{at:g}" for at in grid["alpha"]], [f"{at:g}" for at in grid["beta"]], labels)
    return parts.figure(f"Over the grid: {figure['label']}", drawn)


def _task(task: str | None) -> str:
    return "mean of tasks" if task is None else task.replace("_", " ")


SECTIONS: dict[str, Callable[[Sequence[Artifact]], str]] = {"cka": representations, "behaviour": behaviour, "landscape": landscape}
"""name of the section -> what draws it"""
