"""What a run does about steps that went wrong: the recipe's block, when a loss has jumped, what is remembered, and the records of what was done.

    RUN/bad_steps/
      step_00000057.json               loss or gradient were no numbers: where that began, and whether the step was left out
      step_00000812_rollback_1.json    the loss jumped: the checkpoint that the run went back to, the plans of the data since, the lines of its
                                       metrics that were taken back

A rollback counts from the moment that its record is written: a run that is killed before its next checkpoint finds it, and goes on without the
samples that it names. Owns: these files, and the verdict, which is a pure function of the losses. Knows nothing of models. No torch here: recipes are
checked with it. `recovery` acts.
"""

import json
import shutil
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_prism import artifact
from megatron_prism.config import Block, NonNegative, Positive, PositiveFloat
from megatron_prism.engine import run_folder

FOLDER = "bad_steps"
MEMORY = "bad_steps"
"""its name among what a checkpoint says of the data"""
NORMAL = 1.4826
"""times the median of absolute deviations: the standard deviation of normal numbers"""
Table = dict[str, Any]


class SpikeSection(Block):
    """When the loss has jumped, and how far the run goes back."""

    of: Literal["loss", "grad_norm"] = "loss"
    """what is watched"""
    window: Positive = 128
    """good steps that a step is compared with; no verdict before there are so many"""
    deviations: PositiveFloat | None = 10.0
    """a step is suspect beyond median + this many deviations (1.4826 * the median of the distances to the median)"""
    ratio: Annotated[float, Field(gt=1)] | None = None
    """and beyond this many times the median; with both set, both must be passed"""
    patience: Positive = 2
    """suspect steps in a row that make a spike"""
    margin: NonNegative = 1
    """steps before the first suspect one, and after the last, whose samples are left out with theirs"""
    max_rollbacks: Positive = 3
    """a spike after so many rollbacks stops the run"""

    @model_validator(mode="after")
    def _has_a_limit(self) -> "SpikeSection":
        if self.deviations is None and self.ratio is None:
            raise ValueError("a spike needs a limit: set bad_steps.spike.deviations, ratio or both; bad_steps.spike=none turns it off")
        return self


class BadStepsSection(Block):
    """What happens where loss or gradients are no numbers, or the loss jumps: docs/bad_steps.md."""

    on_nan: Literal["stop", "skip"] = "stop"
    """a step whose loss or gradient norm is NaN or infinite never changes weights. stop: end the run; skip: go on with the next batch"""
    max_skipped: Positive = 3
    """with on_nan=skip: one more within `skip_window` steps stops the run"""
    skip_window: Positive = 1000
    """steps in which `max_skipped` counts"""
    spike: SpikeSection | None = None
    """go back to a checkpoint from before a jump of the loss, and leave out the samples around it; none: off"""

    def check_checkpoints(self, save_interval: int | None, keep_last: int | None) -> None:
        """Errors: ValueError where a spike would find no checkpoint to go back to."""
        if self.spike is None:
            return
        if save_interval is None:
            raise ValueError("bad_steps.spike goes back to a checkpoint, and checkpoint.save_interval is none; set it, or bad_steps.spike=none")
        skips = self.on_nan == "skip"  # a step without a number between two suspect ones is neither, and puts the verdict off
        steps = self.spike.patience + self.spike.margin + (self.max_skipped if skips else 0)
        needed = 1 - -steps // save_interval
        if keep_last is not None and keep_last < needed:
            named = "bad_steps.spike.patience + margin" + (" + bad_steps.max_skipped" if skips else "")
            raise ValueError(
                f"checkpoint.keep_last={keep_last}: {needed - 1} may be saved between the first step that is left out and the verdict (within "
                f"{named} = {steps} steps, one each {save_interval}); keep {needed}"
            )


@dataclass
class Memory:
    """What a run remembers of its steps, in its checkpoints. since: the first of the suspect steps in a row, and its first sample."""

    skipped: list[Table] = field(default_factory=list)
    """steps left out because of NaN: step, first_sample, samples"""
    recent: list[float] = field(default_factory=list)
    """what good steps had, the newest last"""
    suspects: int = 0
    since: tuple[int, int] | None = None
    rollbacks: int = 0

    @classmethod
    def of(cls, data: Table) -> "Memory":
        """What a checkpoint's data says; older ones say nothing."""
        kept = dict(data.get(MEMORY, {}))
        return cls(**kept | ({"since": tuple(kept["since"])} if kept.get("since") else {}))

    def record(self) -> Table:
        """For the checkpoint's data; nothing where there is nothing to say."""
        said = {key: value for key, value in asdict(self).items() if value}
        return {MEMORY: said} if said else {}

    def leave_out(self, step: int, first_sample: int, samples: int, section: BadStepsSection) -> bool:
        """Remember a step of NaN. Whether the recipe allows one more."""
        self.skipped.append({"step": step, "first_sample": first_sample, "samples": samples})
        near = [one for one in self.skipped if one["step"] > step - section.skip_window]
        return len(near) <= section.max_skipped

    def see(self, value: float, step: int, first_sample: int, section: SpikeSection) -> bool:
        """Judge a step that changed weights. Whether it makes a spike."""
        most = limit(self.recent, section)
        if most is None or value <= most:
            self.recent = [*self.recent, value][-section.window :]
            self.suspects, self.since = 0, None
            return False
        self.suspects, self.since = self.suspects + 1, self.since or (step, first_sample)
        return self.suspects >= section.patience


def limit(recent: list[float], section: SpikeSection) -> float | None:
    """Beyond what a step is suspect; None before there is enough to compare with."""
    if len(recent) < section.window:
        return None
    median = statistics.median(recent)
    deviation = NORMAL * statistics.median([abs(value - median) for value in recent])
    limits = [median + section.deviations * deviation] if section.deviations is not None else []
    return max([*limits, *([section.ratio * median] if section.ratio is not None else [])])


# --- records -------------------------------------------------------------------------------------------------------------------------------------


def write(run: Path, step: int, record: Table) -> Path:
    """Rank 0: keep what is known of a bad step; complete on disk when it returns."""
    name = f"step_{step:08d}" + (f"_rollback_{record['rollback']}" if "rollback" in record else "")
    path = run / FOLDER / f"{name}.json"
    artifact.write_atomic(path, json.dumps(record, indent=2) + "\n")
    return path


def rollbacks(run: Path) -> list[tuple[Path, Table]]:
    """Records of a run's rollbacks, with their files, in order."""
    found = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in (run / FOLDER).glob("step_*_rollback_*.json")]
    return sorted(found, key=lambda one: int(one[1]["rollback"]))


def finish_rollbacks(run: Path) -> list[str]:
    """Rank 0, before a run looks for its newest checkpoint: remove those of a history that was taken back, if a kill came in between. Their names."""
    removed = []
    for _, record in rollbacks(run):
        for folder in run_folder.complete_steps(run):
            progress = run_folder.read_state(folder)["progress"]
            if progress["step"] > record["to_step"] and Memory.of(progress["data"]).rollbacks < record["rollback"]:
                (folder / artifact.COMPLETE).unlink()
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder.name)
    return removed


def forget_after(run: Path, step: int) -> None:
    """Rank 0, where a run goes on from `step`: rollbacks to later checkpoints are of another history."""
    for path, record in rollbacks(run):
        if record["to_step"] > step:
            path.unlink()


def amended(run: Path, step: int, data: Table) -> Table:
    """What a checkpoint of `step` says of the data, with the rollbacks that led back to it and that no later checkpoint tells of."""
    memory = Memory.of(data)
    for _, record in rollbacks(run):
        if record["to_step"] == step and record["rollback"] > memory.rollbacks:
            memory.rollbacks = record["rollback"]
            data = {**data, "history": record["data_plans"], "sources": record["data_plans"][-1]["sources"], **memory.record()}
    return data
