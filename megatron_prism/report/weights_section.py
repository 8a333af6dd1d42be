"""The report's section on what changed in the weights: drawn from analysis.json; nothing is measured here."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_prism.analysis import pictures, table
from megatron_prism.analysis.figures import by_layer, select
from megatron_prism.analysis.sums import PAPER_THRESHOLD
from megatron_prism.report import parts
from megatron_prism.report.curves import Curve
from megatron_prism.report.parts import Cell
from megatron_prism.report.runs import Artifact
from megatron_prism.report.scales import STEPS, Axis

Results = Mapping[str, Any]


def section(every: Sequence[Artifact]) -> str:
    """Every comparison of weights."""
    found = [one for one in every if one.kind == "analyze" and one.is_shown]
    content = [_summary([pair for one in found for pair in one.read_json("analysis.json")["pairs"]])]
    for one in found:
        results = one.read_json("analysis.json")
        content += [_pair(pair) for pair in results["pairs"]]
        content += [_angles(results["cosines"])] if results["cosines"] else []
        content += [_series(results["series"])] if results["series"] else []
    return parts.section("weights", "What changed in the weights", [*content, parts.notes(_notes(found))] if found else [])


def _summary(pairs: Sequence[Results]) -> str:
    """A row an update: the whole model."""
    if not pairs:
        return ""
    head = max((table.head(pair) for pair in pairs), key=len)
    rows = []
    for pair in pairs:
        cells = next(iter(table.rows(pair)))
        rows.append([pair["label"], *cells[1:], *["-"] * (len(head) - len(cells))])
    return parts.table(["update", *head[1:]], rows, "every update, the whole model")


def _pair(pair: Results) -> str:
    groups, printed = pair["groups"], pair["paper"]
    layers = by_layer(groups, "layer component")
    norms = [_curve(name, [(row["layer"], row["ratio_of_norms"]) for row in rows]) for name, rows in layers.items()]
    unchanged = select(groups, "total")["total"]["unchanged"]
    shares = [
        _curve(label, [(float(at), 100 * share) for at, share in unchanged[kind].items()]) for label, kind in (("fp32", "fp32"), ("as bf16", "bf16"))
    ]
    if printed and printed["unchanged"]:
        shares.append(_curve("paper, Table 22", [(float(at), share) for at, share in printed["unchanged"].items()]))
    figures = [
        parts.lines("Size of the update by layer", norms, Axis("layer", whole=True), Axis("normalised L2 (ratio of norms)")),
        parts.lines("Unchanged weights", shares, Axis("threshold of |change| / |weight|, %", log=True), Axis("weights, %", (0.0, 100.0))),
        parts.figure("Size of the update by part and layer", pictures.l2_map(groups)),
        parts.figure(f"Weights changed by more than {PAPER_THRESHOLD:g} % (as bf16)", pictures.changed_map(groups)),
    ]
    paper_of = parts.paragraph(f"The paper's figures are those of {printed['row']}.") if printed else ""
    rows = parts.table(table.head(pair), [[row[0].strip(), *row[1:]] for row in table.rows(pair)], f"update {pair['label']}")
    return parts.heading(pair["label"]) + paper_of + parts.grid(figures) + parts.fold("Every component and part", [rows])


def _angles(angles: Sequence[Results]) -> str:
    rows: list[list[str | Cell]] = []
    for angle in angles:
        found = select(angle["groups"], "total") | select(angle["groups"], "component")
        rows += [[f"{angle['one']} and {angle['other']}", name, table.cosine(row["cosine"])] for name, row in found.items()]
    return parts.heading("Directions of two updates") + parts.table(("updates", "component", "cosine"), rows, "cosines of updates")


def _series(series: Results) -> str:
    steps = series["steps"]
    shares = [
        _curve(name, [(0, 0.0), *((row["step"], _percent(row["share_of_change"][name])) for row in steps)]) for name in steps[0]["share_of_change"]
    ]
    shares.append(_curve("summed learning rate", [(0, 0.0), *((row["step"], _percent(row["share_of_lr"])) for row in steps)]))
    changed = [
        _curve(label, [(0, 0.0), *((row["step"], 100 * row["changed"][kind]) for row in steps)])
        for label, kind in (("fp32", "fp32"), ("as bf16", "bf16"))
    ]
    figures = [
        parts.lines("Course of the change", shares, STEPS, Axis("share of the last distance from the start, %")),
        parts.lines(f"Weights changed by more than {PAPER_THRESHOLD:g} %", changed, STEPS, Axis("weights, %")),
    ]
    return parts.heading(table.course_title(series)) + parts.paragraph(series["note"]) + parts.grid(figures)


def _notes(found: Sequence[Artifact]) -> list[str]:
    """Definitions, and the paper's caveats."""
    caveats = [
        f"Paper, {text}" for one in found for pair in one.read_json("analysis.json")["pairs"] if pair["paper"] for text in pair["paper"]["caveats"]
    ]
    return [table.LEGEND + ".", *dict.fromkeys(caveats)]


def _curve(name: str, points: Sequence[tuple[float, float | None]]) -> Curve:
    known = [(float(x), y) for x, y in points if y is not None]
    return Curve(name, known, len(known))


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
