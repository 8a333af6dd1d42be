"""A CKA as a page, a table and a CSV file. Owns: what is shown of cka.json, and what is said beside the figures."""

import csv
import io
import math
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_prism.analysis import heatmap, markup
from megatron_prism.analysis.pictures import COLOURS
from megatron_prism.evals.chart import Axes, Point, lines

Results = Mapping[str, Any]
"""Content of cka.json."""
HEAD = ("set", "least", "at", "least of a draw", "all inputs", "shuffled")
PAPER_HEAD = "paper"
LEGEND = (
    "least: the layer whose mean over the draws is least, its mean and standard deviation; least of a draw: each draw's own least layer, their mean; "
    "all inputs, shuffled: at that layer, of all inputs, and of draws with one side's inputs in another order"
)
TICKS = 12


def page(results: Results) -> str:
    """The whole page."""
    body = [markup.notes(_notes(results)), markup.table(["model", "layers", "width", "path"], _models(results))]
    body.append(markup.section("What they read", [markup.table(["set", "inputs", "tokens", "longest", "cut", "from"], _sets(results))]))
    return markup.document("How alike the representations are", [*body, *(_pair(pair) for pair in results["pairs"])])


def head(pair: Results) -> list[str]:
    """The columns of one pair's table."""
    return [*HEAD, *([PAPER_HEAD] if pair["paper"] else [])]


def rows(pair: Results) -> Iterator[list[str]]:
    """The cells of one pair's table, a row a set."""
    for found in pair["sets"]:
        least = found["min"]
        cells = ["-"] * (len(HEAD) - 1)
        if least is not None:
            at = found["points"][least["point"]]
            spreads = [
                with_spread(least["mean"], least["std"]),
                _place(least["point"]),
                with_spread(least["mean_of_draw_minima"], least["std_of_draw_minima"]),
            ]
            cells = [*spreads, number(at["cka"]), number(at["shuffled"])]
        yield [found["set"], *cells, *([number(pair["paper"]["min"].get(found["set"]))] if pair["paper"] else [])]


def show(results: Results) -> None:
    """Print a table for each pair."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False)
    for pair in results["pairs"]:
        table = Table(title=f"CKA, {pair['label']}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for place, column in enumerate(head(pair)):
            table.add_column(column, justify="right" if place else "left", no_wrap=True)
        for cells in rows(pair):
            table.add_row(*cells)
        console.print(table)
    console.print(LEGEND, highlight=False)


def as_csv(results: Results) -> str:
    """A row a pair, set and point."""
    text = io.StringIO()
    found = [{"pair": pair["label"], "set": each["set"], **point} for pair in results["pairs"] for each in pair["sets"] for point in each["points"]]
    writer = csv.DictWriter(text, list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()


def number(value: float | None) -> str:
    """Four digits behind the point, as the paper prints them."""
    return "-" if value is None else f"{value:.4f}"


def _notes(results: Results) -> list[str]:
    bootstrap, count = results["bootstrap"], results["models"][0]["points"] - 1
    kind = (
        "Linear CKA, columns centred: 1 for representations that are rotations and multiples of each other."
        if results["centred"]
        else "Linear CKA as the paper prints it (Eq. 4), columns not centred: the mean of all inputs, which most inputs share, counts too."
    )
    caveats = [f"Paper, T14: {text}" for pair in results["pairs"] if pair["paper"] for text in pair["paper"]["caveats"]]
    return [
        kind,
        f"Hidden states, each input's mean over its own tokens: 0 is what the first layer is given (the embeddings), 1 to {count} "
        f"are after each layer, {count} after the final norm.",
        f"Mean and standard deviation over {bootstrap['draws']} draws of {bootstrap['size']} inputs, without an input twice.",
        f"Tables: {LEGEND}. Shuffled is what unrelated representations have: above 0, the more so the fewer inputs there are.",
        *(f"{pair['label']}, {found['set']}: {text}" for pair in results["pairs"] for found in pair["sets"] for text in _without(found)),
        *dict.fromkeys(caveats),
    ]


def _without(found: Results) -> Iterator[str]:
    """Points that have no figure."""
    reasons: dict[str, list[int]] = {}
    for point in found["points"]:
        if point["degenerate"]:
            reasons.setdefault(point["degenerate"], []).append(point["point"])
    return (f"no figure at {', '.join(map(_place, places))}: {reason}" for reason, places in reasons.items())


def _models(results: Results) -> list[list[str]]:
    return [[model["name"], str(model["num_layers"]), str(model["hidden_size"]), model["path"]] for model in results["models"]]


def _sets(results: Results) -> list[list[str]]:
    keys = ("name", "inputs", "tokens", "longest", "cut", "from")
    return [[f"{found[key]:,}" if isinstance(found[key], int) else str(found[key]) for key in keys] for found in results["sets"]]


def _pair(pair: Results) -> str:
    paper = [f"The paper's figures are those of {pair['paper']['row']}, mid-trained against RL."] if pair["paper"] else []
    return markup.section(pair["label"], [*map(markup.paragraph, paper), markup.table(head(pair), list(rows(pair))), _curves(pair), _map(pair)])


def _curves(pair: Results) -> str:
    """CKA by layer, a line a set, with whiskers of one standard deviation."""
    series = {
        found["set"]: [Point(point["point"], point["mean"], point["std"]) for point in found["points"] if point["mean"] is not None]
        for found in pair["sets"]
    }
    known = {name: points for name, points in series.items() if points}
    if not known:
        return ""
    points = len(pair["sets"][0]["points"])
    ticks = [(float(place), str(place)) for place in range(0, points, -(-points // TICKS))]
    return lines(known, Axes("layer (0: the embeddings)", "CKA, mean over the draws", ticks), COLOURS)


def _map(pair: Results) -> str:
    """A cell a set and layer: the distance from 1, whose digits tell more."""
    values = [[None if point["mean"] is None else 1 - point["mean"] for point in found["points"]] for found in pair["sets"]]
    columns = [str(place) for place in range(len(values[0]))]
    return heatmap.cells(values, columns, [found["set"] for found in pair["sets"]], heatmap.Labels("layer", "set", "1 - CKA"), "{:.2g}".format)


def with_spread(mean: float, std: float) -> str:
    """A mean and its standard deviation, with as many places as the first digit of that needs."""
    places = max(4, -math.floor(math.log10(std))) if std else 4
    return f"{mean:.{places}f} ± {std:.{places}f}" if std else f"{mean:.4f}"


def _place(point: int) -> str:
    return f"layer {point}" if point else "embeddings"
