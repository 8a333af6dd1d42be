"""Whether a job that is started again and again makes progress: its failures are counted from where it had got farthest.

Owns: the measure, as launch/ending.py says it in shell: the newest checkpoint's step; where a stage saves none, the bytes of its output.
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_prism.artifact import PROVENANCE
from megatron_prism.engine import run_folder
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
        """It has failed once more."""
        reached = _reached(self.stage, self.output)
        if self._farthest is None or reached[0] != self._farthest[0] or reached[1] > self._farthest[1]:
            self._farthest, self.times = reached, 0
        self.times += 1
        self.place = "{} {:,}".format(*reached)


def _reached(stage: str, output: Path | None) -> tuple[str, int]:
    """What grows as the work does, and in which unit."""
    if output is None:
        return "step", 0
    if stage in WITH_CHECKPOINTS or (output / run_folder.CHECKPOINTS).is_dir():
        newest = run_folder.newest(output)
        return "step", int(newest.name.removeprefix("step_")) if newest is not None else 0
    return "bytes", sum(path.lstat().st_size for path in output.rglob("*") if path.is_file() and path.name != PROVENANCE)
