"""The report's section on models that were put together: the weights of merges, and what an extension to longer sequences set."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_prism.report import parts
from megatron_prism.report.parts import Cell
from megatron_prism.report.runs import Artifact


def section(every: Sequence[Artifact]) -> str:
    """Merges, then extensions."""
    shown = [one for one in every if one.is_shown]
    merges = [_merge(one) for one in shown if one.stage == "merge"]
    extensions = [_extension(one) for one in shown if one.kind == "extend"]
    return parts.section("models", "Merging and extension", [*merges, *extensions])


def _merge(one: Artifact) -> str:
    rows: list[list[str | Cell]] = []
    for model in one.provenance["merged"]:
        others = ", ".join(f"{name} {weight:g}" for name, weight in (model.get("parts") or {}).items() if weight is not None)
        rows.append([_short(model["path"]), f"{model['weight']:g}", Cell(others or "-", wrap=True), str(model.get("fingerprint", "-"))[:12]])
    method = str(one.config.get("method", "linear"))
    return parts.heading(f"{one.name} ({method})") + parts.table(
        ("model", "weight", "other weights of parts", "fingerprint"), rows, f"{one.name}: weights"
    )


def _extension(one: Artifact) -> str:
    config = one.config
    facts = {
        "steps": f"{config['steps']:,}",
        "length in training": f"{config['data']['seq_len']:,}",
        "trained weights": str(config.get("trainable", "all")),
    }
    facts |= {f"rope {key}": str(value) for key, value in _flat(config.get("rope") or {}).items()}
    return parts.heading(one.name) + parts.table(("", "setting"), [[name, value] for name, value in facts.items()], f"{one.name}: settings")


def _flat(block: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in block.items() if value is not None and value != "none"}


def _short(path: str) -> str:
    return "/".join(Path(path).parts[-3:])
