"""How long the machine had a processor to spare: what tells a program that slept from one that was kept waiting.

Linux leaves no thread waiting beside an idle processor that it may run on. So of the seconds in which one processor was idle, a program spent each
running or asleep by its own will, however busy the others were; less those in which a quota of its control group kept it from running.
Owns: that lower bound, from /proc/stat and cpu.stat. Where the one cannot be read it is 0: nothing is then known.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

IDLE_FIELD = 4
THROTTLED = {"throttled_usec": 1e-6, "throttled_time": 1e-9}
"""lines of cpu.stat, of version 2 and 1 of control groups, and their unit in seconds"""


class Spare:
    """Begins to count when it is made."""

    def __init__(self) -> None:
        self.idle, self.throttled = idle_seconds(), throttled_seconds()

    def seconds(self) -> float:
        """The longest that any one processor which this process may use was idle since, less throttling."""
        now, allowed = idle_seconds(), os.sched_getaffinity(0)
        most = max((now[place] - before for place, before in self.idle.items() if place in now and place in allowed), default=0.0)
        return max(0.0, most - (throttled_seconds() - self.throttled))


def idle_seconds(stat: Path = Path("/proc/stat")) -> dict[int, float]:
    """Seconds since the start that each processor was idle."""
    found: dict[int, float] = {}
    with suppress(OSError):
        for line in stat.read_text().splitlines():
            name, *fields = line.split()
            if name.startswith("cpu") and name != "cpu":
                found[int(name.removeprefix("cpu"))] = int(fields[IDLE_FIELD - 1]) / os.sysconf("SC_CLK_TCK")
    return found


def throttled_seconds(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """Seconds so far in which this process's control groups, or groups around them, had used up their quota of processor time."""
    total = 0.0
    for file in _stat_files(groups, root):
        with suppress(OSError):
            words = dict(line.split() for line in file.read_text().splitlines())
            total += sum(int(words[name]) * unit for name, unit in THROTTLED.items() if name in words)
    return total


def _stat_files(groups: Path, root: Path) -> Iterator[Path]:
    with suppress(OSError):
        for line in groups.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            own = Path(path.lstrip("/"))
            for folder in (own, *own.parents):
                yield root / ("cpu" if controllers else "") / folder / "cpu.stat"
