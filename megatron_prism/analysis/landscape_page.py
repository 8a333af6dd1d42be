"""The page of a landscape: one HTML file that needs nothing but itself. Owns: its order; the path as a curve, the grid as a map, for each figure."""

from typing import Any

from megatron_prism.analysis import heatmap, landscape_table, markup
from megatron_prism.analysis.landscape_table import Results
from megatron_prism.analysis.pictures import COLOURS
from megatron_prism.evals.chart import Axes, Point, lines

DEFINITION = (
    "Each point is a merged model, W(alpha, beta) = W_base + alpha (W_MT - W_base) + beta (W_RL - W_MT) (arXiv 2603.17074, Eq. 3): (0, 0) is the "
    "base, (1, 0) the mid-trained model, (1, 1) the one after RL."
)
ALONG = "along the path: 0 base, 1 mid-trained, 2 after RL"
ENDS = {0.0: "base", 1.0: "mid-trained", 2.0: "after RL"}


def page(results: Results) -> str:
    """The whole page."""
    written = f"Merged weights were written in {results['dtype']}; config, tokenizer and chat template are those of {results['like']}."
    body = [markup.notes([DEFINITION, written, *results["notes"]])]
    body.append(markup.table(["model", "path"], [[model["name"], model["path"]] for model in results["models"]]))
    body += [markup.section(figure["label"], [_path(results, figure), _grid(results, figure)]) for figure in results["figures"]]
    body.append(markup.section("All points", [markup.table(landscape_table.head(results), _named(landscape_table.rows(results)))]))
    return markup.document("Between and around the models", body)


def _path(results: Results, figure: Results) -> str:
    """A figure along the path, with whiskers of one standard error."""
    points = []
    for stop in results["path"] or []:
        found = _score(results, figure, stop["point"])
        if found is not None:
            points.append(Point(stop["position"], figure["factor"] * found["value"], figure["factor"] * (found["error"] or 0.0)))
    if not points:
        return ""
    positions = [stop["position"] for stop in results["path"]]
    ticks = [(position, ENDS.get(position, f"{position:g}")) for position in positions if position in ENDS] or [(positions[0], f"{positions[0]:g}")]
    ticks += [(end, f"{end:g}") for end in dict.fromkeys((positions[0], positions[-1])) if end not in dict(ticks)]
    return lines({figure["label"]: points}, Axes(ALONG, figure["label"], ticks), COLOURS)


def _grid(results: Results, figure: Results) -> str:
    """A figure over alpha (across) and beta (up)."""
    grid = results["grid"]
    if grid is None:
        return ""
    values = [[_value(results, figure, place) for place in row] for row in grid["points"]]
    columns, rows = ([f"{value:g}" for value in grid[axis]] for axis in ("alpha", "beta"))
    labels = heatmap.Labels("alpha (share of mid-training)", "beta (share of RL)", figure["label"])
    return heatmap.cells(values, columns, rows, labels, shown=lambda value: landscape_table.number({"factor": 1}, value))


def _value(results: Results, figure: Results, place: int) -> float | None:
    found = _score(results, figure, place)
    return None if found is None else figure["factor"] * found["value"]


def _score(results: Results, figure: Results, place: int) -> dict[str, Any] | None:
    found: dict[str, Any] | None = results["points"][place]["scores"].get(figure["name"])
    return found


def _named(rows: list[list[str]]) -> list[list[str]]:
    return [[row[0] or "merged", *row[1:]] for row in rows]
