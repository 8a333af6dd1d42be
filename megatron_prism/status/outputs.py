"""Outputs of the other stages: a prep run by its journal, an evaluation by its responses and scores, any artifact by its mark and its last change."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_prism import artifact
from megatron_prism.status import life
from megatron_prism.status.run import duration, where
from megatron_prism.status.said import State, Status, table

Table = dict[str, Any]


def prep(folder: Path, provenance: Table, config: Table, now: float) -> Status:
    """Prepared data: bytes of input that are done, while it works; documents and tokens."""
    one = _begun(folder, provenance, now, folder / ".resume")
    if one.state == "finished":
        reports = [read_json(path) for path in sorted(folder.glob("*/report.json"))]
        sources = {str(report.get("name")): {key: report.get(key) for key in ("domain", "documents", "tokens")} for report in reports}
        one.facts = {"sources": sources, **{key: sum(report.get(key) or 0 for report in reports) for key in ("documents", "tokens")}}
        return one
    identity = read_json(folder / ".resume" / "run.json.tmp")
    sizes = {source: {path: int(facts.get("bytes") or 0) for path, facts in files.items()} for source, files in table(identity, "inputs").items()}
    one.unit, one.total = "bytes of input", sum(sum(files.values()) for files in sizes.values()) or None
    parts = [_part(path, sizes.get(path.parent.name, {})) for path in sorted((folder / ".resume" / "parts").glob("*/*.jsonl.tmp"))]
    one.done = sum(part["bytes"] for part in parts)
    one.facts = {key: sum(part[key] for part in parts) for key in ("documents", "tokens")}
    one.facts |= {"parts_begun": len(parts), "parts_finished": sum(part["finished"] for part in parts)}
    return one


def _part(path: Path, sizes: Mapping[str, int]) -> dict[str, int]:
    """One part's journal so far: what its last whole line says. Rows of a file that has no bytes of lines count too little until it is done."""
    lines = [json.loads(line) for line in _whole_lines(path)]
    found = {"bytes": 0, "documents": 0, "tokens": 0, "finished": 0}
    if len(lines) < 2:
        return found
    files, order = list(lines[0].get("fingerprints", {})), list(sizes)
    progress = lines[-1]["progress"]
    place, offset = progress["end"]
    first = order.index(files[0]) if files and files[0] in order else 0
    mine = order[first : first + len(files)]
    found["finished"] = int(bool(progress["finished"]))
    done = len(mine) if found["finished"] else max(0, place - first)
    found["bytes"] = sum(sizes[name] for name in mine[:done]) + (min(offset, sizes[mine[done]]) if done < len(mine) else 0)
    found["documents"] = progress["documents"]
    found["tokens"] = sum((unit.get("train") or {}).get("tokens", 0) for unit in lines[1:])
    return found


def evaluation(folder: Path, provenance: Table, config: Table, now: float) -> Status:
    """Models that are scored, tasks that are answered, and the newest scores."""
    one = _begun(folder, provenance, now, folder / "parts")
    models = [str(model.get("name")) for model in config.get("models") or [] if isinstance(model, dict)]
    scored = table(read_json(folder / "scores.json"), "models")
    one.unit = "models"
    if one.state != "finished" or models:
        one.done, one.total = len(scored), max(len(models), len(scored)) if not config.get("follow") else None
    one.facts["scores"] = {name: _scores(found) for name, found in scored.items()}
    answered = {
        path.name: sorted(task.name.removesuffix(".jsonl.zst") for task in path.glob("*.jsonl.zst")) for path in _folders(folder / "responses")
    }
    one.facts["answered"] = {name: tasks for name, tasks in answered.items() if tasks}
    open_ = {path.name: sorted(task.name for task in _folders(path) if not task.name.startswith("hf_")) for path in _folders(folder / "parts")}
    one.facts["in_work"] = {name: tasks for name, tasks in open_.items() if tasks}
    return one


def _scores(found: Table) -> Table:
    tasks = {name: task.get("accuracy") for name, task in (found.get("tasks") or {}).items() if isinstance(task, dict)}
    domains = (found.get("perplexity") or {}).get("domains") or {}
    return {
        **({"tasks": tasks} if tasks else {}),
        **({"perplexity": {name: domain.get("perplexity") for name, domain in domains.items()}} if domains else {}),
    }


def other(folder: Path, provenance: Table, config: Table, now: float) -> Status:
    """An output of which nothing more is known than whether it is whole."""
    return _begun(folder, provenance, now)


def _begun(folder: Path, provenance: Table, now: float, *beside: Path) -> Status:
    state, why = _state(folder, now, *beside)
    return Status(folder.name, folder, str(provenance.get("kind")), state, why, where=where(provenance))


def _state(folder: Path, now: float, *beside: Path) -> tuple[State, str]:
    if artifact.is_complete(folder):
        return "finished", ""
    silent = now - life.last_change(folder, [*beside, folder.with_name(folder.name + ".log")])
    if silent <= life.WORK_SECONDS:
        return "running", f"something was written {duration(silent)} ago"
    return "dead", f"nothing was written for {duration(silent)}, it may be silent for {duration(life.WORK_SECONDS)}: run its stage again to go on"


def read_json(path: Path) -> Table:
    """A file's table; an empty one where it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _whole_lines(path: Path) -> list[bytes]:
    try:
        data = path.read_bytes()
    except OSError:
        return []
    return data[: data.rfind(b"\n") + 1].splitlines()


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
