"""Whether a job that is started again and again makes progress: its failures are counted from where it had got farthest.

Owns: the measure, as launch/ending.py says it in shell: the newest checkpoint's step; where a stage saves none, the bytes of its output.
"""

import os
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from megatron_prism.engine import run_folder
from megatron_prism.errors import UserError
from megatron_prism.launch.ending import ASIDE, BRIEF_MINUTES, BRIEF_TIMES, WITH_CHECKPOINTS


@dataclass
class Failures:
    """Of one job. times: how many there were since it had got farthest; place: how far that is, for people."""

    stage: str
    output: Path | None
    times: int = 0
    place: str = ""
    _farthest: tuple[str, int] | None = None
    _brief: int = 0

    def note(self, seconds: float) -> None:
        """It has failed once more, so long after its start. Where a disk does not say how far it had got, that is no progress."""
        try:
            self._compare(_reached(self.stage, self.output))
        except (OSError, UserError):
            self.place = self.place or "a place that the disk does not tell"
        self.times += 1
        self._brief += self._farthest is not None and self._farthest[0] == "bytes" and seconds < 60 * BRIEF_MINUTES

    def is_over(self, allowed: int) -> bool:
        """Whether it has failed too often, where so many failures without progress are allowed."""
        return self.times > allowed or self._brief > BRIEF_TIMES * allowed

    def _compare(self, reached: tuple[str, int]) -> None:
        if self._farthest is None or reached[0] != self._farthest[0] or reached[1] > self._farthest[1]:
            self._farthest, self.times = reached, 0
        self.place = "{} {:,}".format(*reached)


def _reached(stage: str, output: Path | None) -> tuple[str, int]:
    """What grows as the work does, and in which unit."""
    if output is None:
        return "step", 0
    if stage in WITH_CHECKPOINTS or (output / run_folder.CHECKPOINTS).is_dir():
        newest = run_folder.newest(output)
        return "step", int(newest.name.removeprefix("step_")) if newest is not None else 0
    return "bytes", _work(output)


def _work(output: Path) -> int:
    """Bytes of what a stage has made in its output."""
    total = 0
    for folder, folders, files in os.walk(output):
        folders[:] = [name for name in folders if not _is_aside(name)]
        total += sum(_bytes(Path(folder, name)) for name in files if not _is_aside(name))
    return total


def _is_aside(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in ASIDE)


def _bytes(file: Path) -> int:
    """Of a file that may be gone since its folder was listed."""
    try:
        return file.lstat().st_size
    except OSError:
        return 0
