"""The calendar that `prism train` and `prism rl` share: what is saved, exported and evaluated after which step, when a run stops, and what it owes.

Called on every rank. What happens follows from the step and from what all ranks were told, so that none waits for another for ever. A run is finished
when its last checkpoint got what it was saved for: an export or an evaluation that a stop, an error or kill -9 came before is owed, and made first
thing at the next start. Owns: these decisions, and saving, exporting and evaluating. Knows nothing of what a step does.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

from pydantic import BaseModel

from megatron_prism import artifact
from megatron_prism.engine import checkpoint, parallel, run_folder, stop_signals, watchdog
from megatron_prism.engine.checkpoint import Progress
from megatron_prism.engine.metrics import MetricsLog, read_records
from megatron_prism.engine.ranks import on_main
from megatron_prism.engine.recipe_blocks import CheckpointSection, EvaluationSection, ExportSection
from megatron_prism.engine.saving import Background
from megatron_prism.engine.step import Engine
from megatron_prism.engine.stop_time import StopTime
from megatron_prism.engine.watchdog_settings import WatchdogSection
from megatron_prism.engine.weights import export_hf
from megatron_prism.errors import StoppedEarly

logger = logging.getLogger(__name__)
HF_FILES = "hf_files"
EVALUATION_SECONDS = "evaluation/seconds"
Evaluate = Callable[[Path], dict[str, float]]
"""Called on every rank with a complete checkpoint; its scores, on rank 0. The run is afterwards what it was before."""


class Recipe(Protocol):
    """What the calendar reads of a recipe."""

    output: Path
    steps: int
    precision: Literal["fp32", "bf16"]
    time_limit_minutes: float | None
    checkpoint: CheckpointSection
    export: ExportSection | None
    evaluation: EvaluationSection | None
    watchdog: WatchdogSection | None


class Run(Protocol):
    """What the calendar reads of a run in progress, on one rank. started: by time.monotonic; stop_asked: by a signal to this rank.

    background: what writes checkpoints while the run goes on; None: nothing does. stop_time: whether a stop has the time to save.
    """

    cfg: Recipe
    engine: Engine
    parents: list[Path]
    progress: Progress
    log: MetricsLog
    evaluate: Evaluate | None
    started: float
    stop_asked: bool
    background: Background | None
    stop_time: StopTime

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to people."""
        return self.engine.mesh.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether the run's last step is taken."""
        return self.progress.step == self.cfg.steps

    @property
    def wants_to_stop(self) -> bool:
        """Whether this rank was told to stop, the time is up by its clock, or a save in the background failed, which the save of a stop tells all.

        One rank's yes is to become all ranks'.
        """
        limit = self.cfg.time_limit_minutes
        failed = self.background is not None and self.background.has_failed
        return self.stop_asked or failed or (limit is not None and time.monotonic() - self.started > limit * 60)


@contextmanager
def ending_saves(run: Run) -> Iterator[None]:
    """However it ends inside, what is being written in the background is written to its end: the checkpoint of an earlier step is good."""
    try:
        yield
    except Exception as error:  # told before the wait, which a watchdog may end
        if run.background is not None and run.background.is_busy and not isinstance(error, StoppedEarly):
            logger.error("the run ends by an error, once the save in the background is over", exc_info=error)
        raise
    finally:
        if run.background is not None:
            with watchdog.last_phase("the end of a save"):
                run.background.end()


@contextmanager
def attended(run: Run) -> Iterator[None]:
    """Inside, signals ask the run to stop after its step, a watchdog ends it when it makes no progress, and saves are ended. Called on every rank."""
    watched = watchdog.watching(run.cfg.output, run.cfg.watchdog, lambda: run.progress.step)
    with stop_signals.heard(lambda: setattr(run, "stop_asked", True)), watched, ending_saves(run):
        yield


def stopped_early(output: Path) -> None:
    """At the end of a stage, on every rank, before the process groups end. Errors: StoppedEarly where its run is not finished."""
    if not on_main(lambda: artifact.is_complete(output)):
        raise StoppedEarly(f"{output} was told to stop, and has saved: start the same command again to go on")


def wait_as_allowed(run: Run) -> None:
    """From the first step's end on, groups wait for a rank as long as the watchdog allows one.

    On NCCL ranks first meet in that step: those that do not find each other need no hours.
    """
    if run.cfg.watchdog is not None:
        parallel.wait_longer(run.cfg.watchdog.long_timeout_minutes + watchdog.MINUTES_TO_END)


# --- when --------------------------------------------------------------------------------------------------------------------------------------


def every(interval: int | None, step: int) -> bool:
    """Whether something that happens each `interval` steps happens after this one; None is never."""
    return interval is not None and step % interval == 0


def after_step(run: Run, stopping: bool, save: Callable[[], None]) -> bool:
    """Save, export and evaluate as this step asks for. stopping: as all ranks were told. Whether the run goes on, or is finished."""
    wait_as_allowed(run)
    run.stop_time.end_step()
    _tell_saved(run)
    if every(run.cfg.checkpoint.save_interval, run.progress.step) or run.is_last or stopping:
        save()
    if run.is_last or stopping or _is_due(run, run.cfg.export) or _is_due(run, run.cfg.evaluation):
        settle(run)
    if _is_due(run, run.cfg.export):
        _export(run)
    if _is_due(run, run.cfg.evaluation) and not stopping:
        _evaluate(run)
    if stopping and (not run.is_last or owes_evaluation(run)):
        said = f"stopped after step {run.progress.step} of {run.cfg.steps}: start the same command again to go on"
        run.log.event(run.progress.step, {"stopped": True}, said)
        return False
    return True


def make_good(run: Run) -> None:
    """What the checkpoint that the run goes on from was saved for and did not get."""
    if owes_export(run):
        _export(run)
    if owes_evaluation(run):
        _evaluate(run)


def owes_export(run: Run) -> bool:
    """Whether the checkpoint of this step was saved, and was not exported to the end. The same on every rank."""
    return _is_due(run, run.cfg.export) and on_main(lambda: _is_saved(run) and not _is_exported(run))


def owes_evaluation(run: Run) -> bool:
    """Whether the checkpoint of this step was saved, and was not asked the run's tasks. The same on every rank."""
    return _is_due(run, run.cfg.evaluation) and on_main(lambda: _is_saved(run) and not _is_evaluated(run))


def _is_due(run: Run, section: ExportSection | EvaluationSection | None) -> bool:
    return section is not None and run.progress.step > 0 and (every(section.interval, run.progress.step) or run.is_last)


def _is_saved(run: Run) -> bool:
    """Whether this run has a checkpoint of this step: one that begins at another run's step has none."""
    return artifact.is_complete(_checkpoint(run))


def _is_exported(run: Run) -> bool:
    """config.json is written last; one older than the checkpoint is of a recipe with fewer steps."""
    last, saved = _export_folder(run) / "config.json", _checkpoint(run) / artifact.COMPLETE
    return last.is_file() and last.stat().st_mtime_ns >= saved.stat().st_mtime_ns


def _is_evaluated(run: Run) -> bool:
    return any(record["step"] == run.progress.step and EVALUATION_SECONDS in record for record in read_records(run.cfg.output))


# --- what --------------------------------------------------------------------------------------------------------------------------------------


def save(run: Run, recipe: BaseModel, beside: Callable[[Path], None] | None = None) -> None:
    """The checkpoint of this step, and away with old ones. recipe: `run.cfg`, to be kept with it; beside: as `checkpoint.save` takes it.

    In the background, where the run has one: `checkpoint_seconds` are those that the run stood still for, with waiting for the save before this one.
    """
    begun, cfg = time.perf_counter(), run.cfg
    prune = partial(checkpoint.prune, cfg.output, cfg.checkpoint.keep_last, cfg.checkpoint.keep_every)
    files = cfg.output / HF_FILES
    with watchdog.long_phase("save"):
        folder = checkpoint.save(run.engine, cfg.output, run.progress, files, recipe, run.parents, beside, run.background, after=prune)
    _tell_saved(run)
    seconds = time.perf_counter() - begun
    said = f"saved {folder} in {seconds:.1f} s" if run.background is None else f"copied {folder} in {seconds:.1f} s, to be written in the background"
    run.log.event(run.progress.step, {"checkpoint_seconds": seconds}, said)
    if run.background is None:
        _tell_little_time(run, seconds)


def settle(run: Run) -> None:
    """Wait for what is written in the background: before a checkpoint is read, and before the run ends. Errors: the save's own, on every rank."""
    if run.background is not None:
        with watchdog.long_phase("the end of a save"):
            run.background.wait()
        _tell_saved(run)


def _tell_saved(run: Run) -> None:
    """That a save in the background is complete, when it is."""
    for folder, seconds in [] if run.background is None else run.background.news():
        run.log.event(run.progress.step, {"checkpoint_background_seconds": seconds}, f"saved {folder} in the background, in {seconds:.1f} s")
        _tell_little_time(run, seconds)


def _tell_little_time(run: Run, save_seconds: float) -> None:
    """That a stop would find no time to save, where that is so."""
    warning = run.stop_time.warning(save_seconds)
    if warning is not None:
        run.log.say(warning)


def _export(run: Run) -> None:
    assert run.cfg.export is not None
    output, dtype = _export_folder(run), run.cfg.export.dtype or run_dtype(run.cfg)
    with watchdog.long_phase("export"):
        on_main(lambda: export_hf(_checkpoint(run), output, dtype))
    run.log.say(f"exported {output}")


def _evaluate(run: Run) -> None:
    assert run.evaluate is not None, "the stage hands over what the recipe asks for"
    begun, step = time.perf_counter(), run.progress.step
    run.engine.make_room()
    with watchdog.long_phase("evaluation"):
        scores = run.evaluate(_checkpoint(run))
    seconds = time.perf_counter() - begun
    shown = "  ".join(f"{name.removeprefix('evaluation/')} {100 * value:.1f} %" for name, value in scores.items() if not name.count("/") > 1)
    run.log.event(step, {**scores, EVALUATION_SECONDS: seconds}, f"evaluation at step {step} in {seconds:.1f} s: {shown}")


def _checkpoint(run: Run) -> Path:
    return run_folder.step_folder(run.cfg.output, run.progress.step)


def _export_folder(run: Run) -> Path:
    return run.cfg.output / ("hf" if run.is_last else f"hf_steps/step_{run.progress.step:08d}")


def run_dtype(cfg: Recipe) -> str:
    """The type that a run computes in, and exports in where nothing else is asked for."""
    return "bfloat16" if cfg.precision == "bf16" else "float32"
