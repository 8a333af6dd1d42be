"""What is said about one output: the same for people and, as JSON, for machines."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

State = Literal["finished", "running", "starting", "stopped", "dead", "failed", "waiting", "unreadable"]
"""stopped: at a checkpoint, to be started again. dead: silent for too long, with work lost. failed: it said so itself, or who started it did"""
SCHEMA_VERSION = 1
WELL, LOST, STOPPED = 0, 3, 4
EXIT: dict[str, int] = {"dead": LOST, "failed": LOST, "unreadable": LOST, "stopped": STOPPED}
"""exit status of a state; 0 of every other"""


@dataclass(frozen=True)
class Alarm:
    """Something that a person should look at. step: where it was seen, if that is known."""

    what: str
    text: str
    step: int | None = None


@dataclass
class Status:
    """One output. why: of its state, in words. done of total are counted in `unit`; facts: figures by their names in metrics.jsonl and beside."""

    name: str
    folder: Path
    kind: str
    state: State
    why: str = ""
    done: int | None = None
    total: int | None = None
    unit: str = ""
    eta_seconds: float | None = None
    where: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    alarms: list[Alarm] = field(default_factory=list)
    parts: list["Status"] = field(default_factory=list)

    @property
    def exit(self) -> int:
        """The exit status that this output alone would give."""
        return EXIT.get(self.state, WELL)

    def as_table(self) -> dict[str, Any]:
        """For JSON; what is no number there (NaN) is null."""
        table: dict[str, Any] = _plain({**asdict(self), "folder": str(self.folder)})
        return table


def worst(every: list[Status]) -> int:
    """The exit status of several: what is lost counts before what waits to be started again."""
    codes = {one.exit for one in every}
    return LOST if LOST in codes else STOPPED if STOPPED in codes else WELL


def table(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A table inside a table that a file held; an empty one where there is none, or something else."""
    found = content.get(key)
    return found if isinstance(found, dict) else {}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
