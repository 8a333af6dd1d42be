"""What other programs are told of a run: TensorBoard, Weights & Biases, MLflow. `metrics.jsonl` is the record; these show it.

A run never waits for them, and none of them ends it: each is told by a thread of its own. What one could not take is said once, the next record is
tried, and metrics.jsonl has every line. Only a run that begins is refused for one that cannot be reached. A run that is started again goes on in
the W&B or MLflow run that it began: their ids are in OUTPUT/trackers.json.
"""

import json
import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from megatron_prism.artifact import write_atomic
from megatron_prism.engine.log_settings import LogConfig
from megatron_prism.errors import UserError

logger = logging.getLogger(__name__)

IDS = "trackers.json"
ROLLED_BACK_FROM = "rolled_back_from"
"""in the record of a step that a run went back to: the step at which it did. A number: whoever keeps all that it was told shows it too"""
END_SECONDS = 60.0
"""what all trackers together are given at the end for what they have not taken yet"""
MOST_WAITING = 10_000
"""records, of a tracker that does not take them"""
Record = dict[str, Any]


class Tracker(Protocol):
    """One program. Called by one thread."""

    def take(self, record: Record, when: float) -> None:
        """A record of metrics.jsonl. when: seconds since the epoch."""

    def end(self, failed: bool) -> None:
        """The run has ended, or stops here."""


class Told:
    """A tracker, and the thread that tells it. tracker: None where the thread has to open it."""

    def __init__(self, name: str, open_: Callable[[], Tracker], tracker: Tracker | None) -> None:
        self.name, self.failed, self.lost = name, False, 0
        self._open, self._tracker = open_, tracker
        self._waiting: queue.Queue[tuple[Record, float] | None] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def tell(self, record: Record) -> None:
        """Hand over a record; returns at once."""
        try:
            self._waiting.put_nowait((record, time.time()))
        except queue.Full:
            self._missed("it takes none")

    def finish(self, failed: bool) -> None:
        """Nothing more is told; returns at once."""
        self.failed = failed
        with suppress(queue.Full):  # a full queue is given up by `wait`
            self._waiting.put_nowait(None)

    def wait(self, deadline: float) -> None:
        """For what it has not taken yet. deadline: on the monotonic clock."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            logger.warning("%s has not taken the last records in time and is left; metrics.jsonl has them", self.name)

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            try:
                self._tracker = self._tracker or self._open()
                self._tracker.take(*item)
            except Exception as error:  # whatever another program throws: the run goes on
                self._missed(f"{type(error).__name__}: {error}"[:500])
            else:
                self._took()
        if self._tracker is not None:
            try:
                self._tracker.end(self.failed)
            except Exception as error:
                logger.warning("%s could not be ended: %s: %s", self.name, type(error).__name__, str(error)[:500])

    def _missed(self, why: str) -> None:
        self.lost += 1
        if self.lost == 1:
            logger.warning("%s did not take a record (%s); the run goes on, metrics.jsonl has it, and the next is tried", self.name, why)

    def _took(self) -> None:
        if self.lost:
            logger.warning("%s takes records again; it has missed %d, which are in metrics.jsonl", self.name, self.lost)
            self.lost = 0


def start(config: LogConfig, run: Path, first_step: int, settings: Record, begins: bool) -> list[Told]:
    """The trackers that a recipe asks for. begins: nothing of this run was told yet. Errors: UserError for one that cannot be opened then."""
    makers: dict[str, Callable[[], Tracker]] = {}
    if config.tensorboard:
        makers["TensorBoard"] = lambda: TensorBoard(run, first_step)
    if config.wandb:
        makers["Weights & Biases"] = lambda: WeightsAndBiases(run, config.wandb or "", settings)
    if config.mlflow:
        makers["MLflow"] = lambda: MLflow(run, config.mlflow or "", settings)
    opened = {name: _opened(name, make) for name, make in makers.items() if begins}
    return [Told(name, make, opened.get(name)) for name, make in makers.items()]


def end(trackers: list[Told], failed: bool) -> None:
    """Of a run that is over, or stops here: they have `END_SECONDS` together, so that a job that was told to stop keeps its time."""
    deadline = time.monotonic() + END_SECONDS
    for one in trackers:
        one.finish(failed)
    for one in trackers:
        one.wait(deadline)


def _opened(name: str, make: Callable[[], Tracker]) -> Tracker:
    try:
        return make()
    except Exception as error:
        raise UserError(
            f"{name} cannot be reached or refuses the run ({type(error).__name__}: {str(error)[:500]}): "
            "check its address and key (WANDB_API_KEY, MLFLOW_TRACKING_URI), set WANDB_MODE=offline, or drop the key from log"
        ) from None


class TensorBoard:
    """Event files in OUTPUT/tensorboard. One history: what was said of steps that are taken again is shown no more."""

    def __init__(self, run: Path, first_step: int) -> None:
        self.folder = run / "tensorboard"
        self.events = self._after(first_step)

    def take(self, record: Record, when: float) -> None:
        """One scalar a figure."""
        if ROLLED_BACK_FROM in record:
            self.events.close()
            self.events = self._after(record["step"])
        for key, value in numbers(record).items():
            self.events.add_scalar(key, value, record["step"], walltime=when)

    def end(self, failed: bool) -> None:
        """Write out."""
        self.events.close()

    def _after(self, step: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.folder), purge_step=step + 1)


class WeightsAndBiases:
    """One W&B run a run. `step` is a figure, and the axis of all others: W&B's own count only rises, and would drop steps that are taken again."""

    def __init__(self, run: Path, project: str, settings: Record) -> None:
        import wandb

        entity, _, name = project.rpartition("/")
        known = _known(run, "wandb", project)
        self.session = wandb.init(
            entity=entity or None,
            project=name,
            name=run.name,
            id=known or uuid.uuid4().hex[:12],
            dir=str(run),
            config=settings,
            resume="allow",
            reinit="create_new",
        )
        self.session.define_metric("step")
        self.session.define_metric("*", step_metric="step")
        _remember(run, "wandb", project, self.session.id)

    def take(self, record: Record, when: float) -> None:
        """One line of W&B's history."""
        self.session.log({**numbers(record), "step": record["step"]})

    def end(self, failed: bool) -> None:
        """Upload what is left."""
        self.session.finish(exit_code=int(failed))


class MLflow:
    """One MLflow run a run, by the client: its fluent functions belong to the thread that began the run."""

    def __init__(self, run: Path, experiment: str, settings: Record) -> None:
        import mlflow

        self.client = mlflow.MlflowClient()
        known = _known(run, "mlflow", experiment)
        if known is not None:
            self.id = known
            self.client.update_run(self.id, status="RUNNING")
            return
        place = mlflow.set_experiment(experiment).experiment_id
        self.id = self.client.create_run(place, run_name=run.name).info.run_id
        self.client.log_dict(self.id, settings, "config.json")
        _remember(run, "mlflow", experiment, self.id)

    def take(self, record: Record, when: float) -> None:
        """One value a figure."""
        from mlflow.entities import Metric

        figures = {key.replace("/", "."): value for key, value in numbers(record).items()}
        self.client.log_batch(self.id, [Metric(key, value, round(1000 * when), record["step"]) for key, value in figures.items()])

    def end(self, failed: bool) -> None:
        """Mark it."""
        self.client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


def numbers(record: Record) -> dict[str, float]:
    """What of a record can be drawn."""
    return {key: float(value) for key, value in record.items() if isinstance(value, int | float) and key != "step"}


def _known(run: Path, tracker: str, project: str) -> str | None:
    """The id of the run that this run has there, if it began one in this project."""
    entry = _ids(run).get(tracker, {})
    return str(entry["id"]) if entry.get("project") == project else None


def _remember(run: Path, tracker: str, project: str, id_: str) -> None:
    write_atomic(run / IDS, json.dumps({**_ids(run), tracker: {"project": project, "id": id_}}, indent=1) + "\n")


def _ids(run: Path) -> dict[str, dict[str, str]]:
    try:
        return dict(json.loads((run / IDS).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
