"""Whether a run that is told to stop has the time to save, by what its steps and saves took so far.

The word is heard after the step that is being taken, and what follows it (validation, export, evaluation); then the run saves. Whoever started it
ends it some time after the word (`save_minutes` of a Slurm job, torchrun's patience), and what it had not saved is lost.
Owns: the measure, and one warning a session. Refuses nothing. Rank 0's clock is enough: all ranks stop after the same step.
"""

import os
import time
from dataclasses import dataclass, field

from megatron_prism.config import SAVE_SECONDS


def _allowed() -> float | None:
    """As whoever started this process says."""
    return float(os.environ[SAVE_SECONDS]) if os.environ.get(SAVE_SECONDS) else None


@dataclass
class StopTime:
    """allowed_seconds: from the word to the end; None: nobody said. longest_seconds: of a step with what follows it, all but the first."""

    allowed_seconds: float | None = field(default_factory=_allowed)
    longest_seconds: float = 0.0
    _ended: list[float] = field(default_factory=list)
    _is_told: bool = False

    def end_step(self, now: float | None = None) -> None:
        """A step is over, and what follows it is to come. now: seconds of a clock."""
        self._ended = [*self._ended, time.monotonic() if now is None else now][-2:]
        if len(self._ended) == 2:
            self.longest_seconds = max(self.longest_seconds, self._ended[1] - self._ended[0])

    def warning(self, save_seconds: float) -> str | None:
        """For people, once, where the longest step and a save that took so long are more than is allowed."""
        needed = self.longest_seconds + save_seconds
        if self._is_told or self.allowed_seconds is None or needed <= self.allowed_seconds:
            return None
        self._is_told = True
        return (
            f"told to stop, this run may need {needed / 60:.1f} min to end its step ({self.longest_seconds / 60:.1f} min, with what follows it) "
            f"and to save ({save_seconds / 60:.1f} min), and is ended after {self.allowed_seconds / 60:.1f} min: all since its newest checkpoint "
            "would be lost. "
            f"On Slurm raise save_minutes of the cluster file to {int(needed / 60) + 2} or more (docs/launch.md); save more often"
        )
