"""`prism launch local|slurm|nemo TARGET`: a recipe or a pipeline on this machine, as Slurm jobs, or as a nemo-run experiment.

A pipeline becomes a chain: each stage a job that waits for those it needs. Finished stages are skipped, stages that are still queued are waited for,
so that submitting again after a failure goes on at the stage that failed. Owns: what is launched, the checks before, what is printed.
Refuses: outputs that are out of date, jobs that the cluster would never start, sizes or overrides beside a pipeline, where they stand.
"""

import os
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer

from megatron_prism import stages
from megatron_prism.config import read_toml, validate
from megatron_prism.errors import UserError
from megatron_prism.launch import cluster, nemo, slurm
from megatron_prism.launch.cluster import ClusterConfig
from megatron_prism.launch.job import STOPPED_EARLY, environment, run_local, torchrun_argv, torchrun_variables
from megatron_prism.launch.pipeline import refuse_stale, run_pipeline, states
from megatron_prism.launch.plan import StageEntry, Step, load_plan, single
from megatron_prism.launch.record import Record


@dataclass(frozen=True)
class Target:
    """What is launched. steps: in order; name: of the whole, for people."""

    name: str
    path: Path
    steps: list[Step]
    is_pipeline: bool


def read(words: list[str], stage: str | None, **size: Any) -> Target:
    """A pipeline file, or a recipe with overrides and the size that the command line gives; of a pipeline, hours are the most of any stage.

    Errors: UserError with everything that is wrong.
    """
    paths = [Path(word) for word in words if "=" not in word]
    if len(paths) != 1:
        raise UserError(f"prism launch takes one recipe or pipeline, got {', '.join(map(str, paths)) or 'none'}; an override reads key=value")
    path, overrides = paths[0], [word for word in words if "=" in word]
    given = {key: value for key, value in size.items() if value is not None}
    hours = given.get("hours")
    if isinstance(read_toml(path).get("stage"), list):
        what = [*overrides, *(f"--{key}" for key in given if key != "hours"), *(["--stage"] if stage else [])]
        if what:
            raise UserError(f"{path} is a pipeline, whose stages have their own keys and sizes; write {' '.join(what)} into it")
        name = path.stem if path.stem != "pipeline" else path.absolute().parent.name
        return Target(name, path, [_at_most(step, hours) for step in load_plan(path)], True)
    kind = stage or _kind(path)
    entry = validate({"name": kind.replace(".", "-"), "stage": kind, **given}, StageEntry, where="prism launch")
    step = single(path, overrides, entry)
    return Target(step.output.name, path, [step], False)


def _at_most(step: Step, hours: float | None) -> Step:
    """The step with a wall-clock limit of no more than so many hours."""
    if hours is None or (step.job.hours is not None and step.job.hours <= hours):
        return step
    return replace(step, job=replace(step.job, hours=hours))


def _kind(recipe: Path) -> str:
    """The stage whose recipe this is, by its name: train.toml and train_16k.toml are train's."""
    word = recipe.stem.replace("-", "_").partition("_")[0]
    if word not in stages.STAGES:
        raise UserError(f"{recipe}: its name begins with no stage, so say whose recipe it is: --stage train (stages: {', '.join(stages.STAGES)})")
    return word


def local(target: Target, print_only: bool, restarts: int = 0) -> None:
    """Run it on this machine. restarts: as `run_local` takes it. Errors: SystemExit with the status of what failed, or was told to stop."""
    if target.is_pipeline:
        run_pipeline(target.path, dry_run=print_only, restarts=restarts)
        return
    (step,) = target.steps
    if print_only:
        ours = {**torchrun_variables(), **environment(step.job, base={})}
        typer.echo(shlex.join([*(f"{key}={value}" for key, value in sorted(ours.items())), *torchrun_argv(step.job)]))
        return
    outcome = run_local(step.job, step.log, step.output, restarts)
    if outcome.status == STOPPED_EARLY:
        typer.secho(outcome.message, err=True)
        raise SystemExit(outcome.status)
    if outcome.status:
        typer.secho(f"error: {outcome.message}; its output: {step.log}", fg="red", err=True)
        raise SystemExit(outcome.status)


def on_slurm(target: Target, place: ClusterConfig, after: list[str], print_only: bool) -> None:
    """Queue what is not finished. after: numbers of jobs to wait for; print_only: show the scripts and the commands, write nothing."""
    check(target, place)
    if not print_only:
        require_variables(place)
    numbers: dict[str, str] = {}
    if target.is_pipeline and not print_only:
        Record(target.path, target.steps, runner=False).write()
    for step, state in states(target.steps):
        if state.action == "skip":
            typer.secho(f"# {step.name}: skip, {step.output} is {state.why}", dim=True)
            continue
        behind = [numbers[name] for name in step.after if name in numbers] or after
        waiting = slurm.queued(step.output)
        if waiting is not None:
            numbers[step.name] = waiting
            typer.echo(f"# {step.name}: is job {waiting} already")
            continue
        script = slurm.sbatch_script(step.job, place, job_name(target, step), step.output)
        if print_only:
            numbers[step.name] = "$" + _variable(step)
            typer.echo(_shown(step, script, behind))
        else:
            numbers[step.name] = slurm.enqueue(script, step.output, behind)
            typer.echo(f"{step.name}: job {numbers[step.name]}" + (f" after {', '.join(behind)}" if behind else "") + f", {step.log}")


def on_nemo(target: Target, place: ClusterConfig, detach: bool, print_only: bool) -> None:
    """Run what is not finished as one experiment. Errors: SystemExit where a job failed."""
    check(target, place)
    steps = [step for step, state in states(target.steps) if state.action != "skip"]
    for step in steps if print_only else ():
        typer.echo(nemo.described(step, place))
    if steps and not print_only:
        require_variables(place)
        if not nemo.run_experiment(target.name, steps, place, detach):
            raise SystemExit(1)


def check(target: Target, place: ClusterConfig) -> None:
    """Whether every job may be queued. Errors: one UserError with everything that is wrong."""
    refuse_stale(target.steps)
    found = [(step.name, problem) for step in target.steps for problem in cluster.problems(step.job, place)]
    if found:
        raise UserError("\n".join(f"stage {name}: {problem}" if target.is_pipeline else problem for name, problem in found))


def job_name(target: Target, step: Step) -> str:
    """What squeue shows."""
    return f"{target.name}-{step.name}" if target.is_pipeline else target.name


def require_variables(place: ClusterConfig) -> None:
    """What is passed on must be there where the job is submitted. Errors: UserError."""
    missing = [name for name in place.pass_env if name not in os.environ]
    if missing:
        raise UserError(f"pass_env names {', '.join(missing)}, which is not set here; export it, or take it out of the cluster file")


def _shown(step: Step, script: str, behind: list[str]) -> str:
    """The script and the command that would queue it, as lines that a shell can run where the script is in its file."""
    path = slurm.beside(step.output, ".sbatch")
    # our own variables, which hold the numbers of earlier jobs, stay variables
    words = [word if word.startswith("--dependency=") else shlex.quote(word) for word in slurm.submission(path, behind)]
    return f"# ----- {path}\n{script}# -----\n{_variable(step)}=$({' '.join(words)})\n"


def _variable(step: Step) -> str:
    return "job_" + step.name.replace("-", "_")
