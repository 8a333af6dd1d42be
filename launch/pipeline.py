"""`prism run PIPELINE.toml`: the steps of a plan in order, skipping what is done, stopping at the first failure with the place to look.

Where a stage runs: one on many ranks under a local torchrun of its own; the others, one after another, in a worker process (launch/worker.py).
Owns: the order, what is skipped, what is printed. Refuses: to write over an output that is out of date, unless asked to remake it; which these are is
settled before anything runs, so that nothing that comes up hours later, a disk that fails for a moment among it, removes a finished output.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import typer

from megatron_prism import artifact
from megatron_prism.errors import NOT_KNOWN, UserError
from megatron_prism.launch.job import STOPPED_EARLY, Outcome, run_local
from megatron_prism.launch.plan import Step, load_plan
from megatron_prism.launch.record import Record
from megatron_prism.launch.worker import Worker

_IN_WORDS = {0: "finished", STOPPED_EARLY: "stopped"}
"""exit status of a stage -> what the record of the chain says; any other one failed"""


@dataclass(frozen=True)
class State:
    """What there is to do for a step, and why. stale: its output is finished, but of another request."""

    action: Literal["skip", "run", "continue", "stale"]
    why: str


def run_pipeline(path: Path, dry_run: bool = False, remake: bool = False, restarts: int = 0) -> None:
    """Run a chain of stages. Every recipe is checked before the first one starts. restarts: as `run_local` takes it, for stages on many ranks.

    Errors: UserError for a bad pipeline or recipe, and for an output that is out of date (remake=True removes it instead);
    SystemExit with the failed stage's status otherwise.
    """
    plan = load_plan(path)
    if dry_run:
        _print_plan(plan)
        return
    wide = [f"stage {step.name}: nodes={step.job.nodes}" for step in plan if step.job.nodes > 1]
    if wide:
        raise UserError("\n".join([*wide, f"prism run has this machine alone; queue the chain with prism launch slurm {path}, or set nodes=1"]))
    if not remake:
        refuse_stale(plan)
    doomed = {step.name for step, state in states(plan) if state.action == "stale"} if remake else set()
    started, ran, record = time.monotonic(), 0, Record(path, plan, runner=True)
    record.write()
    with _Workers(restarts) as workers:
        for number, step in enumerate(plan, 1):
            ran += _advance(step, f"[{number}/{len(plan)}]", workers, record, step.name in doomed)
    typer.secho(f"pipeline done in {_duration(time.monotonic() - started)}: {ran} run, {len(plan) - ran} skipped", bold=True)


def refuse_stale(plan: list[Step]) -> None:
    """UserError that names every finished output which is out of date."""
    stale = [f"stage {step.name}: {step.output} is out of date: {state.why}" for step, state in states(plan) if state.action == "stale"]
    if stale:
        raise UserError("\n".join([*stale, "choose other outputs, or have these removed and made again: prism run PIPELINE.toml --remake"]))


class _Workers:
    """The worker process of one-process stages: started when one is needed, gone while torchrun has the machine."""

    def __init__(self, restarts: int) -> None:
        self._worker: Worker | None = None
        self._restarts = restarts

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._worker is not None and kind is not None:
            self._worker.end()
        self.release()

    def run(self, step: Step) -> Outcome:
        if step.parallel:
            self.release()
            return run_local(step.job, step.log, step.output, self._restarts)
        if self._worker is None:
            self._worker = Worker()
        return self._worker.run(step.job, step.log)

    def release(self) -> None:
        """End the worker, and with it the memory that it holds."""
        if self._worker is not None:
            self._worker.close()
        self._worker = None


def _advance(step: Step, label: str, workers: _Workers, record: Record, doomed: bool) -> bool:
    """Bring one step to its end; False when there was nothing to do. doomed: it was out of date before the first step began, and is to be remade."""
    state = state_of(step)
    if state.action == "skip":
        typer.secho(f"{label} {step.name}: skip, {step.output} is {state.why}", dim=True)
        return False
    if state.action == "stale":
        if not doomed:
            raise UserError(
                f"stage {step.name}: {step.output} has come out of date since this command began: {state.why}; nothing of it was removed. "
                "Choose another output, or start again with --remake to have it removed and made again"
            )
        shutil.rmtree(step.output)
    ranks = f" on {step.job.ranks} ranks" if step.parallel else ""
    typer.secho(f"{label} {step.name}: {state.action} {step.job.stage}{ranks}: {state.why}", bold=True)
    started = time.monotonic()
    record.write(step, state="running")
    outcome = workers.run(step)
    seconds = time.monotonic() - started
    if outcome.status == 0 and not artifact.is_complete(step.output):
        outcome = Outcome(STOPPED_EARLY, f"it stopped before {step.output} was complete; run the pipeline again to continue")
    record.write(step, state=_IN_WORDS.get(outcome.status, "failed"), status=outcome.status, message=outcome.message, seconds=round(seconds, 1))
    if outcome.status:
        typer.secho(f"error: stage {step.name} failed after {_duration(seconds)}: {outcome.message}", fg="red", err=True)
        typer.secho(f"its output: {step.log}", fg="red", err=True)
        raise SystemExit(outcome.status)
    typer.secho(f"{label} {step.name}: done in {_duration(seconds)}, {step.output}", fg="green")
    return True


def states(plan: list[Step]) -> list[tuple[Step, State]]:
    """What running the pipeline would do: a finished step whose input will be made anew is out of date too."""
    found: list[tuple[Step, State]] = []
    anew: set[Path] = set()
    for step in plan:
        state = state_of(step)
        inputs = (
            [parent for parent in _parents(step) if any(parent.absolute().is_relative_to(made) for made in anew)] if state.action == "skip" else []
        )
        if inputs:
            state = State("stale", f"its input {inputs[0]} will be made anew")
        if state.action != "skip":
            anew.add(step.output.absolute())
        found.append((step, state))
    return found


def state_of(step: Step) -> State:
    """What running this step now would do. Errors: NOT_KNOWN where the file system does not say: that puts nothing out of date."""
    if not artifact.is_complete(step.output):
        begun = artifact.begun_as(step.output) is not None
        return State("continue", f"{step.output} is not complete") if begun else State("run", f"-> {step.output}")
    try:
        artifact.require(step.output)
        reasons = artifact.changes(step.output, step.config, step.module.parents(step.config))
    except NOT_KNOWN:
        raise
    except UserError as error:
        reasons = [str(error)]
    return State("stale", "; ".join(reasons)) if reasons else State("skip", "complete and unchanged")


def _parents(step: Step) -> list[Path]:
    return [Path(parent) for parent in step.module.parents(step.config)]


def _print_plan(plan: list[Step]) -> None:
    rows = [("stage", "kind", "ranks", "recipe", "output", "would")]
    for step, state in states(plan):
        would = f"stop: out of date ({state.why})" if state.action == "stale" else state.action
        rows.append((step.name, step.job.stage, str(step.job.ranks) if step.parallel else "-", str(step.job.recipe or "-"), str(step.output), would))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        typer.echo("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]))


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
