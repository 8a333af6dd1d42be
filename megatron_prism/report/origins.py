"""The report's section on lineage: the graph, a table of artifacts, what is odd about them, each one's command."""

import shlex
from collections.abc import Sequence
from typing import Any

from megatron_prism.report import lineage, parts
from megatron_prism.report.parts import Cell
from megatron_prism.report.runs import Artifact

KEY = (
    '<p class="faint"><span class="key data"></span> data &emsp;<span class="key model"></span> model &emsp;'
    '<span class="key measure"></span> measurement &emsp;<span class="key dashed"></span> not finished, or not there. '
    "An arrow leads from what was read to what was made of it. A commit with + had changes that were not committed.</p>"
)


def section(every: Sequence[Artifact]) -> str:
    """Who came from whom."""
    drawn = f'<div class="scroll" role="region" tabindex="0" aria-label="lineage graph">{lineage.picture(every, _anchors(every))}</div>'
    head = ("artifact", "stage", "state", "finished, UTC", "took", "commit", "digest", "made from")
    table = parts.table(head, [_row(one) for one in every if one.provenance], "artifacts")
    return parts.section("lineage", "Lineage", [parts.warning(odd(every)), KEY, drawn, table])


def provenance(every: Sequence[Artifact]) -> str:
    """How each artifact can be made again."""
    anchors = _anchors(every)
    details = [_details(one, anchors[id(one)]) for one in every if one.provenance]
    return parts.section("provenance", "Provenance", [parts.fold("Commands, machines and versions of each artifact", details)])


def _anchors(every: Sequence[Artifact]) -> dict[int, str]:
    """Where the page tells of an artifact, by its id()."""
    return {id(one): f"artifact-{place}" for place, one in enumerate(every) if one.provenance}


def odd(every: Sequence[Artifact]) -> list[str]:
    """What is wrong, in a sentence each."""
    found = []
    for one in every:
        if one.state == "unreadable":
            found.append(f"{one.name} cannot be read, and nothing of it is drawn: {one.problem}")
        elif one.state == "missing":
            children = [child.name for child in every if any(link.artifact is one for link in child.parents)]
            found.append(f"{one.name}, from which {', '.join(children)} was made, is not there.")
        elif one.state == "unfinished":
            found.append(f"{one.name} is not finished ({lineage.state_in_words(one)}): its figures are those so far.")
        found += [f"{one.name} was made from {link.path}, {_why(link.note)}" for link in one.parents if link.note]
    return found


def _why(note: str) -> str:
    return {
        "made again since": "which was made again since: what is there now is another one.",
        "this checkpoint was removed": "a checkpoint that was removed.",
    }[note]


def _made_from(one: Artifact) -> str:
    """Its parents, each once with the steps that were read."""
    steps: dict[str, list[int]] = {}
    for link in one.parents:
        steps.setdefault(link.artifact.name, []).extend([link.step] if link.step is not None else [])
    shown = {name: " ".join(f"{step:,}" for step in sorted(read)) for name, read in steps.items()}
    return ", ".join(f"{name} step{'s' * (' ' in read)} {read}" if read else name for name, read in shown.items())


def _row(one: Artifact) -> list[str | Cell]:
    made_from = _made_from(one)
    commit = str(one.provenance.get("commit") or "-")
    return [
        one.name,
        one.stage,
        lineage.state_in_words(one),
        parts.moment(one.record.get("finished_at", "")).removesuffix(" UTC"),
        Cell(parts.seconds(one.seconds), f"last of {one.sessions} sessions" if one.sessions > 1 else ""),
        Cell(commit[:8], "+" if commit.endswith("+changes") else ""),
        one.digest[:8] or "-",
        Cell(made_from or "-", wrap=True),
    ]


def _details(one: Artifact, anchor: str) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in one.provenance.get("versions", {}).items())
    facts = [
        ("command", shlex.join(map(str, one.provenance.get("command", []))) or "-"),
        ("folder", str(one.folder)),
        ("started", parts.moment(one.provenance.get("started_at", ""))),
        ("machine", _machine(one.provenance.get("host") or {})),
        ("versions", versions or "-"),
        ("commit", str(one.provenance.get("commit") or "-")),
        ("digest", one.digest or "-"),
        ("config hash", str(one.provenance.get("config_hash", "-"))),
    ]
    return parts.heading(f"{one.name} ({one.stage})", anchor) + parts.table(
        ["", ""], [[name, Cell(value, wrap=True)] for name, value in facts], one.name
    )


def _machine(host: dict[str, Any]) -> str:
    gpus = host.get("gpus") or []
    shown = [
        f"{len(gpus)} x {gpus[0]}" if gpus else "no GPU",
        f"{host.get('cpus', '?')} cores",
        f"{host.get('memory_gib', '?')} GiB",
        f"{host.get('ranks', 1)} ranks",
    ]
    return f"{host.get('name', '?')}: {', '.join(shown)}"
