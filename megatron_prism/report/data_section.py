"""The report's section on data: what was prepared, and what each run took of it, planned beside true. Counts are exact: the sampler's own."""

import math
from collections.abc import Sequence
from typing import Any

from megatron_prism.data_prep.history import consumption, recorded
from megatron_prism.report import chart, parts
from megatron_prism.report.parts import Cell
from megatron_prism.report.runs import CHECKPOINTS, STEP, Artifact
from megatron_prism.report.scales import Axis, number

RUNS = ("train", "extend")


def section(every: Sequence[Artifact]) -> str:
    """Pools, then shares."""
    pools = [one for one in every if one.kind == "prep" and one.is_shown]
    runs = [one for one in every if one.kind in RUNS and one.is_shown]
    drawn = [content for one in runs if (content := _shares(one))]
    return parts.section("data", "Data", [*drawn, *([_pools(pools)] if pools else [])])


def plans(one: Artifact) -> list[dict[str, Any]]:
    """The plans of a run's data: from its provenance, or from its newest checkpoint where an older version wrote it."""
    if one.provenance.get("data_plans"):
        return list(one.provenance["data_plans"])
    states = sorted(one.folder.glob(f"{CHECKPOINTS}/{STEP}/state.json"))
    return recorded(one.read_json(str(states[-1].relative_to(one.folder)))["progress"]["data"]) if states else []


def _shares(one: Artifact) -> str:
    """What a run took of each source."""
    records, lines = plans(one), [line for line in one.lines() if "tokens" in line]
    if not records or not lines:
        return ""
    seq_len = int(one.config["data"]["seq_len"])
    samples = int(lines[-1]["tokens"]) // seq_len
    taken = consumption(records, samples, seq_len)
    weights = {source["name"]: source["weight"] for source in records[-1]["sources"]}
    total = math.fsum(weights.values())
    planned = {name: 100 * weights[name] / total if name in weights else None for name in taken}
    true = {name: 100 * found["samples"] / max(samples, 1) for name, found in taken.items()}
    names = ("planned", "consumed")
    drawn = chart.bars([(name, (planned[name], true[name])) for name in taken], names, Axis("share of tokens, %"))
    rows: list[list[str | Cell]] = [
        [
            name,
            "left" if planned[name] is None else f"{planned[name]:.2f} %",
            f"{true[name]:.2f} %",
            number(found["tokens"]),
            "-" if found["epochs"] is None else f"{found['epochs']:.3g}",
        ]
        for name, found in taken.items()
    ]
    table = parts.table(("source", "planned", "consumed", "tokens", "epochs"), rows, f"{one.name}: shares of sources")
    changed = [f"From sample {record['first_sample']:,} on: {'; '.join(record.get('changes', []))}." for record in records[1:]]
    said = f"{number(samples * seq_len)} tokens in {samples:,} sequences of {seq_len:,}. Planned: weights of the last plan. Consumed: counted."
    return (
        parts.heading(one.name)
        + parts.notes(changed)
        + parts.grid([parts.figure("Shares of sources", drawn, said, chart.bar_legend(names)), f"<div>{table}</div>"])
    )


def _pools(pools: Sequence[Artifact]) -> str:
    """What preparation made, a row a source."""
    rows: list[list[str | Cell] | parts.Row] = []
    for pool in pools:
        rows.append(parts.Row([pool.name], "group"))
        for path in sorted(pool.folder.glob("*/report.json")):
            found = pool.read_json(str(path.relative_to(pool.folder)))
            bytes_ = found.get("text_bytes") or 0
            per_token = f"{bytes_ / found['tokens']:.2f}" if bytes_ and found["tokens"] else "-"
            rows.append(
                [
                    f"{found['name']}",
                    str(found.get("domain", "-")),
                    f"{found['documents']:,}",
                    number(found["tokens"]),
                    per_token,
                    f"{found.get('held_out_documents', 0):,}",
                    _removed(found),
                ]
            )
    head = ("source", "domain", "documents", "tokens", "bytes a token", "held out", "records left out")
    return parts.heading("Prepared sources") + parts.table(head, rows, "prepared sources")


def _removed(found: dict[str, Any]) -> Cell:
    """Records that became no documents: by reason, then by rule of the cleaning."""
    counts = {name: found.get(name, 0) for name in ("blank", "empty")} | dict(found.get("bad") or {}) | dict(found.get("dropped") or {})
    shown = [f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items() if count]
    return Cell(", ".join(shown) or "none", wrap=len(shown) > 2)
