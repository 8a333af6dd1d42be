"""Whether somebody is still at work on an output, told by what its files did last.

A run that is alive writes a line every `log.interval` steps; between two lines it may save and evaluate. One that was silent for SILENT_TIMES as long
(and for SHORTEST_SECONDS at least) is taken for dead. Before its first step a run loads its model, and another stage may compute for long without
writing: those have START_SECONDS and WORK_SECONDS. Times are those of files: the clock of a shared file system may be another than this machine's.
"""

import time
from collections.abc import Iterable
from pathlib import Path

SILENT_TIMES = 3.0
SHORTEST_SECONDS = 60.0
START_SECONDS = 1800.0
WORK_SECONDS = 1800.0
PROVENANCE = "provenance.json"
DEPTH = 3
MOST_ENTRIES = 2000


def last_change(folder: Path, beside: Iterable[Path] = ()) -> float:
    """When a file in the folder, or one beside it, changed last; 0 where there is none. Of huge folders the first entries are looked at."""
    found = [_time(path) for path in (folder, *beside)]
    todo, seen = [(folder, DEPTH)], 0
    while todo and seen < MOST_ENTRIES:
        place, depth = todo.pop()
        for path in _entries(place):
            seen += 1
            found.append(_time(path))
            if depth > 1 and path.is_dir() and not path.is_symlink():
                todo.append((path, depth - 1))
    return max(found)


def allowed_silence(seconds_between_lines: float | None, save_seconds: float, evaluation_seconds: float) -> float:
    """How long a run may say nothing. seconds_between_lines: None before the first step of a session."""
    if seconds_between_lines is None:
        return START_SECONDS
    return max(SHORTEST_SECONDS, SILENT_TIMES * (seconds_between_lines + save_seconds + evaluation_seconds))


def is_process(pid: int, started: float) -> bool:
    """Whether a process of this machine that began at that time (by /proc, in clock ticks since boot) is still there."""
    return process_start(pid) == started


def process_start(pid: int) -> float | None:
    """When a process of this machine began, in clock ticks since boot; None where there is none (or no /proc)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else float(fields[19])


def now() -> float:
    """The time, as files have it."""
    return time.time()


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
