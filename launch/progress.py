"""Whether a job that is started again and again makes progress: its failures are counted from where it had got farthest.

Owns: the measure, as launch/ending.py says it in shell: the newest checkpoint's step; where a stage saves none, the bytes of its output.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from megatron_prism.artifact import PROVENANCE
from megatron_prism.engine import run_folder
from megatron_prism.errors import UserError
from megatron_prism.launch.ending import WITH_CHECKPOINTS


@dataclass
class Failures:
    """Of one job. times: how many there were since it had got farthest; place: how far that is, for people."""

    stage: str
    output: Path | None
    times: int = 0
    place: str = ""
    _farthest: tuple[str, int] | None = None

    def note(self) -> None:
        """It has failed once more. Where nobody can say how far it had got, because a disk does not answer, that is no progress."""
        try:
            self._compare(_reached(self.stage, self.output))
        except (OSError, UserError):
            self.place = self.place or "a place that the disk does not tell"
        self.times += 1

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
    return "bytes", sum(_bytes(Path(folder, name)) for folder, _, names in os.walk(output) for name in names if name != PROVENANCE)


def _bytes(file: Path) -> int:
    """Of a file that may be gone since its folder was listed."""
    try:
        return file.lstat().st_size
    except OSError:
        return 0
