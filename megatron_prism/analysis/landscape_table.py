"""A landscape as a table: a row a point, as it is printed and as the page shows it. Owns: rounding; landscape.json has every figure unrounded."""

from collections.abc import Mapping
from typing import Any

from megatron_prism.analysis.table import open_console, print_table

Results = Mapping[str, Any]
"""Content of landscape.json."""
UNITS = {"accuracy": "{} %", "loss": "{} loss"}
"""kind of a figure -> how a column is headed"""
CORNERS = {(0.0, 0.0): "base", (1.0, 0.0): "mid-trained", (1.0, 1.0): "after RL"}


def head(results: Results) -> list[str]:
    """The columns."""
    return ["", "alpha", "beta", *(UNITS.get(kind, "{}").format(of) for kind, _, of in (one["name"].partition("/") for one in results["figures"]))]


def rows(results: Results) -> list[list[str]]:
    """The points, in their order."""
    return [
        [
            corner(point),
            f"{point['alpha']:g}",
            f"{point['beta']:g}",
            *(cell(figure, point["scores"].get(figure["name"])) for figure in results["figures"]),
        ]
        for point in results["points"]
    ]


def show(results: Results) -> None:
    """Print the points."""
    console = open_console()
    title = "merged models: accuracy in %, loss in nats a token"
    print_table(console, title, head(results), rows(results))
    for line in results["notes"]:
        console.print(line, highlight=False)


def corner(point: Results) -> str:
    """Which model a point is; empty where it is a merged one."""
    return CORNERS.get((point["alpha"], point["beta"]), "")


def cell(figure: Results, found: Mapping[str, float | None] | None) -> str:
    """A score in its unit, with its standard error; - for what was no finite number."""
    if found is None or found["value"] is None:
        return "-"
    text = number(figure, found["value"])
    return text if found["error"] is None else f"{text} ± {number(figure, found['error'])}"


def number(figure: Results, value: float) -> str:
    """A score in its unit, without its error."""
    return f"{100 * value:.1f}" if figure["factor"] == 100 else f"{figure['factor'] * value:.4g}"
