"""The page of an analysis: one HTML file that needs nothing but itself. Owns: its order, and what is said beside the figures."""

from megatron_prism.analysis import markup, pictures, table
from megatron_prism.analysis.table import Results

DEFINITIONS = (
    "L2: normalised L2 of the update, ||new - old|| / ||old||, Euclidean norms over elements (arXiv 2603.17074, Eq. 1). The paper does not say how "
    "matrices are put together. L2 is the ratio of norms (all matrices of a group as one vector), mean L2 the mean of matrices (each tensor counts "
    "one); matrices.csv has the third way, every matrix alone.",
    ">1%: share of elements with |new - old| of at least 1 % of |old|. fp32: as read; bf16: both rounded to bfloat16 first, in which neighbours "
    "lie 0.39 to 0.78 % apart, so that a smaller change vanishes or becomes as large as that. same bf16: equal after rounding.",
    "rank: stable rank of the update of a matrix, squared Frobenius norm over squared spectral norm; the mean over matrices.",
)


def page(results: Results) -> str:
    """The whole page."""
    body = [markup.notes(_notes(results)), markup.table(["model", "read as", "path"], _models(results))]
    body += [_pair(pair) for pair in results["pairs"]]
    body += [_angle(angle) for angle in results["cosines"]]
    if results["series"]:
        body.append(_series(results["series"]))
    return markup.document("What changed in the weights", body)


def _notes(results: Results) -> list[str]:
    short = [model["name"] for model in results["models"] if _share_in_32_bits(model) < 0.5]
    rounded = [f"{', '.join(short)}: most weights are stored in 16 bits; the figures called fp32 are those of rounded weights."] if short else []
    caveats = [f"Paper, {text}" for pair in results["pairs"] if pair["paper"] for text in pair["paper"]["caveats"]]
    return [*DEFINITIONS, *rounded, *dict.fromkeys(caveats)]


def _share_in_32_bits(model: Results) -> float:
    """Of its elements. A hybrid's A_log, D and dt_bias are fp32 in any folder."""
    elements = model["read_as"]
    return sum(elements.get(kind, 0) for kind in ("float32", "float64")) / sum(elements.values())


def _models(results: Results) -> list[list[str]]:
    return [[model["name"], ", ".join(model["read_as"]), model["path"]] for model in results["models"]]


def _pair(pair: Results) -> str:
    groups = pair["groups"]
    drawn = [
        pictures.l2_by_layer(groups),
        pictures.l2_map(groups),
        pictures.unchanged_by_threshold(groups, pair["paper"]),
        pictures.changed_map(groups),
    ]
    paper = [f"The paper's figures are those of {pair['paper']['row']}."] if pair["paper"] else []
    return markup.section(pair["label"], [*map(markup.paragraph, paper), markup.table(table.head(pair), list(table.rows(pair))), *drawn])


def _angle(angle: Results) -> str:
    found = table.select(angle["groups"], "total") | table.select(angle["groups"], "component") | table.select(angle["groups"], "part")
    rows = [[name, table.cosine(row["cosine"])] for name, row in found.items()]
    drawn = pictures.cosine_by_layer(angle["groups"])
    return markup.section(f"Cosine of {angle['one']} and {angle['other']}", [markup.table(["", "cosine"], rows), drawn])


def _series(series: Results) -> str:
    drawn = [pictures.shares_by_step(series), pictures.changed_by_step(series)]
    course = markup.table(*table.course(series, list(series["steps"][0]["share_of_change"])))
    return markup.section(table.course_title(series), [markup.paragraph(series["note"]), course, *drawn])
