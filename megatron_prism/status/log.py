"""Lines of a metrics.jsonl: of one that is being written right now, was cut by a crash, is empty, or is of an older version.

Owns: reading in bounded time (of a file beyond 24 MiB its beginning and its end), leaving out what is no whole line of a step.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

METRICS = "metrics.jsonl"
HEAD_BYTES, TAIL_BYTES = 4 << 20, 20 << 20
Line = dict[str, Any]


class Log(NamedTuple):
    """lines: by the order of the file. modified: when it last grew; None where there is none. broken: lines that cannot be read, but for the last."""

    lines: list[Line]
    modified: float | None
    broken: int = 0


def read(run: Path) -> Log:
    """The log of a run."""
    path = run / METRICS
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if size <= HEAD_BYTES + TAIL_BYTES:
                data = file.read()
            else:
                head = file.read(HEAD_BYTES)
                file.seek(size - TAIL_BYTES)
                tail = file.read()
                data = head[: head.rfind(b"\n") + 1] + tail[tail.find(b"\n") + 1 :]
        modified = path.stat().st_mtime
    except OSError:
        return Log([], None)
    found = [_parsed(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
    lines = [line for line in found if line is not None]
    return Log(lines, modified, len(found) - len(lines))


def steps_of(lines: list[Line]) -> list[Line]:
    """The lines of training steps, of either kind of run, each step once."""
    last = {int(line["step"]): line for line in lines if "grad_norm" in line or "reward" in line or "loss" in line}
    return [last[step] for step in sorted(last)]


def newest(lines: list[Line], key: str) -> Line | None:
    """The last line that has a key."""
    return next((line for line in reversed(lines) if key in line), None)


def number(line: Line | None, key: str) -> float | None:
    """A figure of a line, if it is a number (which may be NaN)."""
    value = line.get(key) if line else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _parsed(line: bytes) -> Line | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else None
