"""Who came from whom: artifacts as boxes, from left to right, each in the column after its last parent. Pure but for names and states.

Owns: the layout (columns by depth, rows by where the parents stand; an arrow that passes a column has a lane of its own there, so that none runs
behind a box), and what a box says: name, stage, when, digest, and its state in words.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from megatron_prism.report.runs import Artifact, Link, progress

BOX_WIDTH, BOX_HEIGHT, LANE_HEIGHT, COLUMN_GAP, ROW_GAP, MARGIN = 138, 62, 4, 30, 16, 6
LETTERS = 14
GROUPS = {
    **dict.fromkeys(("tokenizer", "prep", "prompts", "ngrams", "positions"), "data"),
    **dict.fromkeys(("train", "extend", "rl", "merge", "convert"), "model"),
}
"""what a stage makes; everything else measures"""


@dataclass(eq=False)
class Place:
    """Where an artifact stands, or (one is None) where the arrows that leave `source` pass a column."""

    one: Artifact | None
    column: int
    source: Artifact | None = None
    before: list["Place"] = field(default_factory=list)
    """what leads here"""
    top: float = 0.0

    @property
    def height(self) -> float:
        """Of the box, or of the lane."""
        return BOX_HEIGHT if self.one else LANE_HEIGHT

    @property
    def x(self) -> float:
        """Left edge."""
        return MARGIN + self.column * (BOX_WIDTH + COLUMN_GAP)

    @property
    def middle(self) -> float:
        """Of its height."""
        return self.top + self.height / 2


def layout(every: Sequence[Artifact]) -> list[Place]:
    """A box for each artifact, a lane for each column that its arrows pass; parents must stand before children."""
    depth: dict[int, int] = {}
    boxes: dict[int, Place] = {}
    lanes: dict[tuple[int, int], Place] = {}
    for one in every:
        depth[id(one)] = max((depth.get(id(link.artifact), -1) for link in one.parents), default=-1) + 1
        boxes[id(one)] = place = Place(one, depth[id(one)])
        for link in one.parents:
            if id(link.artifact) in boxes:
                place.before.append(_lane(boxes[id(link.artifact)], place.column, lanes))
    places = [*boxes.values(), *lanes.values()]
    columns = [[place for place in places if place.column == column] for column in range(max(depth.values(), default=-1) + 1)]
    tallest = max((_height(members) for members in columns), default=0.0)
    for members in columns:
        members.sort(key=lambda place: fmean([before.middle for before in place.before]) if place.before else 0.0)
        top = MARGIN + (tallest - _height(members)) / 2
        for place in members:
            place.top = top
            top += place.height + ROW_GAP
    return places


def _lane(parent: Place, column: int, lanes: dict[tuple[int, int], Place]) -> Place:
    """What leads from a parent into a column: the parent itself, or its lane in the column before."""
    last = parent
    for passed in range(parent.column + 1, column):
        key = (id(parent.one), passed)
        last = lanes.setdefault(key, Place(None, passed, parent.one, [last]))
    return last


def _height(members: Sequence[Place]) -> float:
    return sum(place.height for place in members) + ROW_GAP * max(0, len(members) - 1)


def picture(every: Sequence[Artifact], anchors: dict[int, str]) -> str:
    """The graph. anchors: where on the page an artifact is told of, by its id()."""
    places = layout(every)
    boxes = [place for place in places if place.one]
    arrows = "".join(_arrow(before, place) for place in places for before in place.before)
    width = max(box.x for box in boxes) + BOX_WIDTH + MARGIN
    height = max(place.top + place.height for place in places) + MARGIN
    drawn = "".join(_box(box, box.one, anchors.get(id(box.one))) for box in boxes if box.one)
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" style="width:100%;max-width:{width:.0f}px;min-width:{width * 0.8:.0f}px"'
    label = f"lineage of {len(boxes)} artifacts: what each was made from"
    return f'<svg class="lineage" {size} role="group" aria-label="{label}">{_TIP}{arrows}{drawn}</svg>'


_TIP = (
    '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0 0L8 4L0 8z" class="tip"/></marker></defs>'
)


def state_in_words(one: Artifact) -> str:
    """finished, unreadable, missing, or how far it is."""
    reached = progress(one) if one.state == "unfinished" else None
    return f"unfinished, step {reached[0]:,} of {reached[1]:,}" if reached else one.state


def _box(place: Place, one: Artifact, anchor: str | None) -> str:
    x, y = place.x, place.top
    when = str(one.record.get("finished_at") or one.provenance.get("started_at") or "")[:10]
    second = f"{when}  {one.digest[:7]}" if one.state == "finished" else _progress_line(one)
    hint = f"{one.name}: {one.stage or 'artifact'}, {state_in_words(one)}. {one.problem}".strip()
    content = (
        f"<title>{html.escape(hint)}</title>"
        f'<rect x="{x}" y="{y:.1f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="9"/>'
        f'<text class="name" x="{x + 10}" y="{y + 21:.1f}">{html.escape(_fit(one.name))}</text>'
        f'<text class="kind" x="{x + 10}" y="{y + 37:.1f}">{html.escape(one.stage or "artifact")}</text>'
        f'<text class="fact" x="{x + 10}" y="{y + 53:.1f}">{html.escape(second)}</text>'
    )
    group = f'<g class="box {GROUPS.get(one.stage, "measure")} {one.state}">{content}</g>'
    return f'<a href="#{anchor}">{group}</a>' if anchor else group


def _progress_line(one: Artifact) -> str:
    reached = progress(one) if one.state == "unfinished" else None
    if reached:
        return f"{reached[0]:,} of {reached[1]:,} steps"
    return {"unreadable": "✕ cannot be read", "missing": "? not there"}.get(one.state, one.state)


def _arrow(before: Place, place: Place) -> str:
    """From a box or lane to the next one; a tip where it is a box."""
    x, end = before.x + BOX_WIDTH, place.x - (3 if place.one else 0)
    bend, source = (end - x) / 2, before.one or before.source
    path = f"M{x} {before.middle:.1f}C{x + bend:.1f} {before.middle:.1f} {end - bend:.1f} {place.middle:.1f} {end} {place.middle:.1f}"
    if not place.one:
        path += f"H{place.x + BOX_WIDTH}"
    tip = ' marker-end="url(#tip)"' if place.one else ""
    link = next((link for link in place.one.parents if link.artifact is source), None) if place.one else None
    odd = " odd" if (link and link.note) or (source and source.state in ("missing", "unreadable")) else ""
    return f'<path class="edge{odd}" d="{path}"{tip}><title>{html.escape(_told(source, place.one, link))}</title></path>'


def _told(source: Artifact | None, child: Artifact | None, link: Link | None) -> str:
    told = f"from {source.name}" if source else ""
    told += f" to {child.name}" if child else ""
    told += f", step {link.step:,}" if link and link.step is not None else ""
    return told + (f" ({link.note})" if link and link.note else "")


def _fit(name: str) -> str:
    return name if len(name) <= LETTERS else f"…{name[-LETTERS + 1 :]}"
