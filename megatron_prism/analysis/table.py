"""An analysis as tables: what is printed, and the two CSV files.

OUTPUT/matrices.csv    a row a matrix and pair
OUTPUT/groups.csv      a row a group and pair: the model, components, parts, layers

Owns: which figures are shown, and how they are rounded; analysis.json has all of them, unrounded.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from megatron_prism.analysis.figures import select
from megatron_prism.analysis.sums import PAPER_THRESHOLD, THRESHOLDS

Results = Mapping[str, Any]
"""Content of analysis.json."""
AT = f"{PAPER_THRESHOLD:g}"
HEAD = ("", "elements", "L2", "mean L2", f">{AT}% fp32", f">{AT}% bf16", "same bf16", "rank")
PAPER_HEAD = ("paper: L2", f">{AT}%")
KINDS = ("fp32", "bf16")
WIDE = 150
"""columns of a log"""
LEGEND = (
    f"L2: ||new - old|| / ||old|| of all elements together; mean L2: of single tensors; >{AT}%: elements that changed by at least {AT} %, as read "
    "and both sides rounded to bf16; same bf16: equal after rounding; rank: stable rank of the update, mean over matrices"
)


def rows(pair: Results) -> Iterator[list[str]]:
    """The cells of one pair's table; the paper's two columns last where it has a row there."""
    kinds = ["total", "component", "part", "slice", *(["paper part"] if pair["paper"] else [])]
    for kind in kinds:
        for name, row in select(pair["groups"], kind).items():
            label = {"slice": f"  {name}", "paper part": f"{name}, as T23"}.get(kind, name)
            yield [label, *_cells(row), *(_paper_cells(pair["paper"], kind, name) if pair["paper"] else [])]


def head(pair: Results) -> list[str]:
    """The columns of one pair's table."""
    return [*HEAD, *(PAPER_HEAD if pair["paper"] else ())]


def show(results: Results) -> None:
    """Print a table for each pair, then angles and the course of a series."""
    console = open_console()
    for pair in results["pairs"]:
        print_table(console, pair["label"], head(pair), rows(pair))
    for angle in results["cosines"]:
        found = select(angle["groups"], "total") | select(angle["groups"], "component")
        shown = ", ".join(f"{name} {cosine(row['cosine'])}" for name, row in found.items())
        console.print(f"cosine of {angle['one']} and {angle['other']}: {shown}", highlight=False)
    if results["series"]:
        print_table(console, course_title(results["series"]), *course(results["series"], ["total"]))
        console.print(results["series"]["note"], highlight=False)
    console.print(LEGEND, highlight=False)


def course_title(series: Results) -> str:
    """What the table of a series shows."""
    return f"{series['run']}: share of its distance from {series['start']}, and of its summed learning rate"


def course(series: Results, names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of a series. names: of the components whose shares are shown."""
    head = ["step", "L2", *names, "summed lr", f">{AT}% fp32", f">{AT}% bf16"]
    body = [
        [
            str(row["step"]),
            number(row["normalised_l2"]["total"]),
            *(percent(row["share_of_change"][name]) for name in names),
            percent(row["share_of_lr"]),
            percent(row["changed"]["fp32"]),
            percent(row["changed"]["bf16"]),
        ]
        for row in series["steps"]
    ]
    return head, body


def matrices_csv(results: Results) -> str:
    """The file of single matrices."""
    found = [{"pair": pair["label"], **_flat(row)} for pair in results["pairs"] for row in pair["matrices"]]
    return _csv(found)


def groups_csv(results: Results) -> str:
    """The file of groups, those of a series' steps among them."""
    series = results["series"]["updates"] if results["series"] else []
    return _csv([{"pair": pair["label"], **_flat(row)} for pair in [*results["pairs"], *series] for row in pair["groups"]])


def number(value: float | None) -> str:
    """Three digits."""
    return "-" if value is None else f"{value:.3g}"


def cosine(value: float | None) -> str:
    """Four places: of two updates that are nearly one, what tells them apart."""
    return "-" if value is None else f"{value:.4f}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share in per cent."""
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def open_console() -> Any:
    """What tables are printed on. Names and paths are people's: [base] is a name, no markup. A log has room for wide tables."""
    from rich.console import Console

    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, WIDE)
    return console


def print_table(console: Any, title: str, columns: Sequence[str], body: Iterable[Sequence[str]]) -> None:
    """A table of cells as they are, the first column its names."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    for cells in body:
        table.add_row(*cells)
    console.print(table)


def _cells(row: Results) -> list[str]:
    changed = [percent(1.0 - row["unchanged"][kind][AT]) for kind in ("fp32", "bf16")]
    norms = [number(row["ratio_of_norms"]), number(row["mean_of_matrices"])]
    return [_size(row["elements"]), *norms, *changed, percent(row["identical"]["bf16"]), number(row["mean_stable_rank"])]


def _size(count: int) -> str:
    unit, name = next(((unit, name) for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")) if count >= unit), (1, ""))
    return f"{count / unit:.3g}{name}"


def _paper_cells(paper: Results, kind: str, name: str) -> list[str]:
    l2 = paper["l2"].get(name) if kind in ("total", "component") else None
    changed = paper["changed"].get(name) if kind in ("part", "paper part") else None
    if kind == "total" and paper["sparsity"] is not None:
        changed = 100 - paper["sparsity"]
    return [number(l2), "-" if changed is None else f"{changed:.1f} %"]


def _flat(row: Results) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in row.items():
        if key == "identical":
            found |= {f"identical_{kind}": value[kind] for kind in KINDS}
        elif key == "unchanged":
            found |= {f"unchanged_{kind}_{at:g}_percent": value[kind][f"{at:g}"] for kind in KINDS for at in THRESHOLDS}
        else:
            found[key] = "x".join(map(str, value)) if isinstance(value, list) else value
    return found


def _csv(found: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    if found:
        writer = csv.DictWriter(text, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    return text.getvalue()
