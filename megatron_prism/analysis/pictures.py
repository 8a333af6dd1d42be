"""The pictures of an analysis, as SVG. Colours are Okabe and Ito's for lines and cividis' for maps, which the colour-blind can tell apart.

Owns: what each picture shows. Layers are numbered as in the Hugging Face model, from 0.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_prism.analysis.figures import by_layer, select
from megatron_prism.analysis.heatmap import LARGE, SCALE_WIDTH, colour, scale, text
from megatron_prism.analysis.sums import PAPER_THRESHOLD, THRESHOLDS
from megatron_prism.evals.chart import Axes, Point, lines

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a8a8a")
CELL_WIDTH, CELL_HEIGHT, LEFT, TOP, BOTTOM, LARGEST_WIDTH = 22, 20, 84, 26, 60, 420
TICKS = 12
Rows = Sequence[Mapping[str, Any]]


def l2_by_layer(groups: Rows) -> str:
    """Normalised L2 of each component, layer by layer."""
    series = {name: [(row["layer"], row["ratio_of_norms"]) for row in rows] for name, rows in by_layer(groups, "layer component").items()}
    return _lines(series, "layer", "normalised L2 of the update (ratio of norms)", _layer_ticks(groups), from_zero=True)


def unchanged_by_threshold(groups: Rows, paper: Mapping[str, Any] | None) -> str:
    """Share of weights that changed by less than a threshold: in fp32, as stored in bf16, and the paper's."""
    total = select(groups, "total")["total"]["unchanged"]
    series = {label: [(float(at), 100 * share) for at, share in total[kind].items()] for label, kind in (("fp32", "fp32"), ("as bf16", "bf16"))}
    if paper and paper["unchanged"]:
        series["the paper's (Table 22)"] = [(float(at), share) for at, share in paper["unchanged"].items()]
    ticks = [(at, f"{at:g}") for at in THRESHOLDS]
    return _lines(
        series, "threshold of |change| / |weight|, % (each doubling equally wide)", "unchanged weights, %", ticks, log_x=True, y_range=(0.0, 100.0)
    )


def l2_map(groups: Rows) -> str:
    """Normalised L2 of each part in each layer."""
    return _map(groups, lambda row: row["ratio_of_norms"], "normalised L2 of the update")


def changed_map(groups: Rows) -> str:
    """Share of changed weights of each part in each layer, as stored in bf16."""
    at = f"{PAPER_THRESHOLD:g}"
    return _map(groups, lambda row: 100 * (1 - row["unchanged"]["bf16"][at]), f"weights changed by more than {at} % as bf16, %")


def cosine_by_layer(groups: Rows) -> str:
    """Cosine of two updates, component by component."""
    series = {name: [(row["layer"], row["cosine"]) for row in rows] for name, rows in by_layer(groups, "layer component").items()}
    return _lines(series, "layer", "cosine of the two updates", _layer_ticks(groups))


def shares_by_step(series: Mapping[str, Any]) -> str:
    """Share of a run's change by step, by component, beside the share of its summed learning rate."""
    steps = series["steps"]
    found = {name: [(row["step"], _percent(row["share_of_change"][name])) for row in steps] for name in steps[0]["share_of_change"]}
    found["summed learning rate"] = [(row["step"], _percent(row["share_of_lr"])) for row in steps]
    return _by_step(found, "share of the last checkpoint's distance from the start, %")


def changed_by_step(series: Mapping[str, Any]) -> str:
    """Share of weights that differ from the start by more than 1 %, by step."""
    steps = series["steps"]
    found = {label: [(row["step"], 100 * row["changed"][kind]) for row in steps] for label, kind in (("fp32", "fp32"), ("as bf16", "bf16"))}
    return _by_step(found, f"weights changed by more than {PAPER_THRESHOLD:g} %, %")


def _by_step(series: Mapping[str, Sequence[tuple[float, float | None]]], y_label: str) -> str:
    """From step 0, at which nothing has changed."""
    known = {name: [(0, 0.0), *points] for name, points in series.items() if any(y is not None for _, y in points)}
    steps = sorted({int(x) for points in known.values() for x, _ in points})
    return _lines(known, "step", y_label, _ticks(steps), from_zero=True)


def _lines(
    series: Mapping[str, Sequence[tuple[float, float | None]]],
    x_label: str,
    y_label: str,
    ticks: Sequence[tuple[float, str]],
    *,
    log_x: bool = False,
    y_range: tuple[float, float] | None = None,
    from_zero: bool = False,
) -> str:
    """A chart of what is defined; empty where nothing is."""
    known = {name: [Point(x, y) for x, y in points if y is not None] for name, points in series.items()}
    known = {name: points for name, points in known.items() if points}
    largest = max((point.y for points in known.values() for point in points), default=0.0)
    if from_zero and largest:
        y_range = (0.0, 1.05 * largest)
    return lines(known, Axes(x_label, y_label, ticks, y_range, log_x), COLOURS) if known else ""


def _map(groups: Rows, value: Any, label: str) -> str:
    """A cell for each part (down) and layer (across), with its figure as a hint, and the scale below."""
    parts = {name: {row["layer"]: value(row) for row in rows if value(row) is not None} for name, rows in by_layer(groups, "layer part").items()}
    values = [found for cells in parts.values() for found in cells.values()]
    if not values:
        return ""
    low, high, layers = min(values), max(values), _layers(groups)
    cell = min(CELL_WIDTH, LARGEST_WIDTH / len(layers))
    marks = [text(4, 14, label, "start")]
    for line, (part, cells) in enumerate(parts.items()):
        y = TOP + line * CELL_HEIGHT
        marks.append(text(LEFT - 6, y + 14, part, "end"))
        for layer, found in cells.items():
            box = f'x="{LEFT + layers.index(layer) * cell:.1f}" y="{y}" width="{cell - 1:.1f}" height="{CELL_HEIGHT - 1}"'
            hint = f"layer {layer}, {part}: {found:.3g}"
            marks.append(f'<rect {box} fill="{colour(found, low, high)}"><title>{html.escape(hint)}</title></rect>')
    bottom, wide = TOP + len(parts) * CELL_HEIGHT, cell * len(layers)
    marks += [text(LEFT + (layers.index(int(at)) + 0.5) * cell, bottom + 14, name, "middle") for at, name in _ticks(layers)]
    marks.append(text(LEFT + wide / 2, bottom + 30, "layer", "middle"))
    width = max(LEFT + max(wide + 8, SCALE_WIDTH), 8 + LARGE * len(label))
    marks += scale(LEFT, bottom + 38, low, high)
    size = f'viewBox="0 0 {width:.0f} {bottom + BOTTOM}" width="{width:.0f}" height="{bottom + BOTTOM}"'
    described = html.escape(f"{label}, by part and layer", quote=True)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{described}" font-family="sans-serif">{"".join(marks)}</svg>'


def _layers(groups: Rows) -> list[int]:
    return sorted({row["layer"] for row in groups if row["layer"] is not None})


def _layer_ticks(groups: Rows) -> list[tuple[float, str]]:
    return _ticks(_layers(groups))


def _ticks(values: Sequence[int]) -> list[tuple[float, str]]:
    """At most TICKS of the values, evenly taken."""
    stride = -(-len(values) // TICKS)
    return [(float(value), str(value)) for value in values[::stride]]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
