"""What `prism train` does about a step that went wrong: find where a NaN began, leave the step out or stop; go back from a loss that has jumped.

Called on every rank. All decisions follow from numbers that are equal on all ranks (sums over them, the checkpoints that rank 0 finds), so that none
waits for another. Owns: the acts; `bad_steps` owns the rules and the records, `origin` the search. Refuses: what the recipe does not allow, by
DivergenceError; the newest checkpoint is then from before.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist

from megatron_prism import artifact
from megatron_prism.data_prep.history import recorded, without_window
from megatron_prism.engine import bad_steps, checkpoint, memory_check, origin, run_folder
from megatron_prism.engine.bad_steps import Memory, limit
from megatron_prism.engine.metrics import read_records
from megatron_prism.engine.ranks import on_main
from megatron_prism.engine.step import DivergenceError, StepReport, forward_backward
from megatron_prism.engine.trackers import ROLLED_BACK_FROM
from megatron_prism.errors import FaultyMachineError, PassingDivergenceError

if TYPE_CHECKING:
    from megatron_prism.engine.loop import Run

MOST_SAMPLES = 16
"""of a micro-batch, so many are named"""
NOT_STARTED = "the run stops; nothing after its newest checkpoint was saved"


class Return(NamedTuple):
    """A way back: the checkpoint, its place in the run, and the samples that are left out, as the run counts them."""

    name: str
    step: int
    samples: int
    first_sample: int
    num_samples: int


def leave_out(run: Run, report: StepReport, random_states: dict[str, Any] | None) -> None:
    """A step whose loss or gradient norm was no number, and which changed nothing: say where that began, and go on or stop, as the recipe says.

    Called when the run's progress is behind the step. Errors: DivergenceError.
    """
    section, progress = run.cfg.bad_steps, run.progress
    step, first = progress.step, progress.samples - run.cfg.global_batch
    refuse_changed_memory(run, f"step {step}")
    run.engine.make_room()  # the replay is eager; were it to run out of memory, a restart would meet the same samples
    found = origin.find(run.engine, lambda: forward_backward(run.engine, run.data, first, forward_only=False), random_states)
    allowed = run.memory.leave_out(step, first, run.cfg.global_batch, section)
    samples = _samples(run, first, found)
    goes_on = section.on_nan == "skip" and allowed
    what = f"step {step}: loss {report.loss}, gradient norm {report.grad_norm}; samples {first} to {progress.samples - 1}"
    said = f"{what}. {found.describe()}{_named(samples)}"
    if run.is_main:
        record = {
            "step": step,
            "loss": str(report.loss),
            "grad_norm": str(report.grad_norm),
            "first_sample": first,
            "num_samples": run.cfg.global_batch,
            "action": "skip" if goes_on else "stop",
            "origin": found.record(),
            "samples": samples,
            "message": said,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        path = bad_steps.write(run.cfg.output, step, record)
        kept = {key: record[key] for key in ("action", "loss", "grad_norm", "first_sample", "num_samples", "origin", "samples")}
        run.log.event(step, {"bad_step": kept}, f"{said}. The step was left out: {path}" if goes_on else f"step {step} went wrong: {path}")
    if goes_on:
        return
    if section.on_nan == "stop":
        way_on = "lower optimizer.lr, look at these samples, or leave such steps out (bad_steps.on_nan=skip)"
    else:
        way_on = f"more than bad_steps.max_skipped={section.max_skipped} of {section.skip_window} steps went so: lower optimizer.lr, or look at them"
    if not found.repeated:
        raise PassingDivergenceError(f"{said}. Nothing of this step was saved; start the same command again")
    raise DivergenceError(f"{said}. Nothing of this step was saved; {way_on}")


def refuse_changed_memory(run: Run, what: str) -> None:
    """Errors: FaultyMachineError, on every rank, where the last look found memory that is not what the last update wrote."""
    if run.engine.optimizer.memory is None:
        return
    wrong = memory_check.damages(run.engine.optimizer.memory)
    if wrong:
        raise FaultyMachineError(
            f"{what}: memory changed since the last update, by no step of the run ({'; '.join(wrong)}). Nothing of it was saved: start the same "
            "command again, and take a machine out of the run that is named again"
        )


def look_at_memory(run: Run) -> None:
    """Before a save: what is written is what the last update wrote. Errors: as `refuse_changed_memory`."""
    if run.engine.optimizer.memory is not None:
        checkpoint.gather_weights(run.engine)
        run.engine.optimizer.memory.look()
        refuse_changed_memory(run, f"save of step {run.progress.step}")


def _samples(run: Run, first: int, found: origin.Origin) -> list[dict[str, Any]]:
    """What the first micro-batch that went wrong held: where the data can tell."""
    if found.micro_batch is None:
        return []
    start = first + found.micro_batch * run.cfg.micro_batch
    named = []
    for index in range(start, start + min(run.cfg.micro_batch, MOST_SAMPLES)):
        source, documents = run.data.documents(index)
        named.append({"sample": index, "source": source, "documents": documents})
    return named


def _named(samples: list[dict[str, Any]]) -> str:
    if not samples:
        return ""
    shown = [f"{one['sample']} ({one['source']}, documents {', '.join(map(str, one['documents'][: origin.NAMED]))})" for one in samples[:2]]
    return f"; samples of that micro-batch: {', '.join(shown)}" + (f" and {len(samples) - 2} more" if len(samples) > 2 else "")


# --- spikes --------------------------------------------------------------------------------------------------------------------------------------


def has_spiked(run: Run, report: StepReport) -> bool:
    """Judge a step that changed weights, whose place the run's progress is behind."""
    section = run.cfg.bad_steps.spike
    if section is None or not report.applied:
        return False
    value = report.loss if section.of == "loss" else report.grad_norm
    return run.memory.see(value, run.progress.step, run.progress.samples - run.cfg.global_batch, section)


def roll_back(run: Run, report: StepReport) -> None:
    """Put the run where it was before the jump, and leave out the samples around it. Errors: DivergenceError where it may or can not."""
    section, memory, step = run.cfg.bad_steps.spike, run.memory, run.progress.step
    assert section is not None and memory.since is not None
    value = report.loss if section.of == "loss" else report.grad_norm
    what = (
        f"step {step}: {section.of} {value:.6g} is the last of {memory.suspects} in a row, from step {memory.since[0]} on, beyond "
        f"{limit(memory.recent, section):.6g}, after {section.window} good steps"
    )
    if run.background is not None:
        run.background.wait()
    if memory.rollbacks >= section.max_rollbacks:
        raise DivergenceError(f"{what}. The run went back {memory.rollbacks} times (bad_steps.spike.max_rollbacks): {NOT_STARTED}")
    way = on_main(lambda: _way_back(run))
    if way is None:
        raise DivergenceError(
            f"{what}. There is no checkpoint from before it to go back to: {NOT_STARTED}. Save more often (checkpoint.save_interval), or keep more"
        )
    folder = run.cfg.output / run_folder.CHECKPOINTS / way.name
    records = without_window(recorded(run.data.fingerprint), way.first_sample, way.num_samples, step=step, because=what)
    said = f"{what}: back to {folder}, samples {way.first_sample} to {way.first_sample + way.num_samples - 1} are left out"
    on_main(lambda: _take_back(run, way, records, said))
    _go_back(run, way, records)
    what_was = {"from_step": step, "first_sample": way.first_sample, "num_samples": way.num_samples}
    run.log.event(way.step, {"rollback": what_was, ROLLED_BACK_FROM: step}, said)


def _way_back(run: Run) -> Return | None:
    """The newest checkpoint of before the samples that are left out; else of before the first suspect step. Of the last plan of the data."""
    section, since = run.cfg.bad_steps.spike, run.memory.since
    assert section is not None and since is not None
    margin = section.margin * run.cfg.global_batch
    end = run.progress.samples + margin
    begun = int(recorded(run.data.fingerprint)[-1]["first_sample"])
    places = [(folder.name, run_folder.read_state(folder)["progress"]) for folder in run_folder.complete_steps(run.cfg.output)]
    for latest in (since[1] - margin, since[1]):
        there = [(name, place) for name, place in places if begun <= place["samples"] <= latest]
        if there:
            name, place = there[-1]
            first = max(since[1] - margin, place["samples"])
            return Return(name, place["step"], place["samples"], first, end - first)
    return None


def _take_back(run: Run, way: Return, records: list[dict[str, Any]], said: str) -> None:
    """Rank 0: from the moment that the record is on disk the rollback counts; a kill before the end leaves nothing that would be gone on from."""
    record = {
        "rollback": run.memory.rollbacks + 1,
        "step": run.progress.step,
        "to_step": way.step,
        "first_sample": way.first_sample,
        "num_samples": way.num_samples,
        "message": said,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "data_plans": records,
        "taken_back": [line for line in read_records(run.cfg.output) if line["step"] > way.step],
    }
    bad_steps.write(run.cfg.output, run.progress.step, record)
    bad_steps.finish_rollbacks(run.cfg.output)
    run.log.take_back(way.step)
    artifact.annotate(run.cfg.output, data_plans=records)


def _go_back(run: Run, way: Return, records: list[dict[str, Any]]) -> None:
    rollbacks = run.memory.rollbacks + 1
    dist.barrier()
    run.engine.make_room()
    run.progress = checkpoint.load_all(run.engine, run.cfg.output / run_folder.CHECKPOINTS / way.name)
    run.memory = Memory.of(run.progress.data)
    run.memory.rollbacks = rollbacks
    run.data.follow(records)
    run.recent.clear()
