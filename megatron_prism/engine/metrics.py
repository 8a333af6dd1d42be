"""What a run says about itself: `metrics.jsonl` always, TensorBoard, wandb, MLflow and Prometheus when asked, and one line for people.

Called on rank 0 only; the other ranks get a log that says nothing.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_prism.artifact import write_atomic
from megatron_prism.config import Block, Positive
from megatron_prism.engine import prometheus
from megatron_prism.errors import UserError

METRICS = "metrics.jsonl"
ROLLED_BACK_FROM = "rolled_back_from"
"""in the line of a step that a run went back to: the step at which it did. A number: writers that keep all that they were told show it too"""
MOST_OF_AN_ERROR = 2000
"""characters"""
Metrics = dict[str, Any]


class LogConfig(Block):
    """Where the metrics of a run go beside `metrics.jsonl`."""

    interval: Positive = 10
    """steps between two lines"""
    tensorboard: bool = False
    """write TensorBoard events into OUTPUT/tensorboard"""
    wandb: str | None = None
    """Weights & Biases project"""
    mlflow: str | None = None
    """MLflow experiment"""
    prometheus: Annotated[int, Field(strict=True, ge=0, le=65535)] | None = None
    """port of 127.0.0.1 at which a Prometheus server of this machine finds the newest figures; 0: a free one, which is told (docs/status.md)"""


class MetricsLog:
    """One run's metrics. Lines beyond the step that a run resumes from are dropped, so that the file tells one history.

    Errors: UserError for a port of `log.prometheus` that is taken.
    """

    def __init__(self, run: Path, config: LogConfig, first_step: int, total_steps: int, enabled: bool, settings: Metrics) -> None:
        self.enabled = enabled
        if not enabled:
            return
        self.path, self.last_step = run / METRICS, first_step
        _drop_lines_after(self.path, first_step)
        self.file = self.path.open("a", encoding="utf-8")
        self.console = Console(file=sys.stderr)
        self.writers = [self._prometheus(run, config.prometheus, settings)] if config.prometheus is not None else []  # first: it may be refused
        self.writers += [make(run, name, settings) for make, name in _chosen_writers(config, first_step)]
        self.bar = _progress_bar(self.console, first_step, total_steps) if self.console.is_terminal else None

    def step(self, number: int, metrics: Metrics, total_steps: int) -> None:
        """Record one step's metrics (shown as a line, or in the live bar on a terminal)."""
        if not self.enabled:
            return
        self._write({"step": number, **metrics})
        line = _line(number, total_steps, metrics)
        if self.bar is None:
            self.console.print(line, highlight=False, soft_wrap=True)
        else:
            self.bar.update(self.bar.task_ids[0], completed=number, description=line)

    def event(self, number: int, metrics: Metrics, text: str) -> None:
        """Record something that is not a training step: a validation, a save; shown on a line of its own."""
        if not self.enabled:
            return
        self._write({"step": number, **metrics})
        self.say(text)

    def say(self, text: str) -> None:
        """Show a line to people."""
        if self.enabled:
            self.console.print(text, highlight=False, soft_wrap=True)

    def take_back(self, step: int) -> None:
        """Drop the lines beyond a step that the run goes back to: the file tells one history. Writers hear of it by a record of ROLLED_BACK_FROM."""
        if not self.enabled:
            return
        self.file.close()
        _drop_lines_after(self.path, step)
        self.file, self.last_step = self.path.open("a", encoding="utf-8"), step

    def close(self) -> None:
        """Flush and close everything. An error that is on its way out when a `finally` calls this is the last line of the file."""
        if not self.enabled:
            return
        error = sys.exc_info()[1]
        if isinstance(error, Exception | KeyboardInterrupt) and not self.file.closed:
            self._write({"step": self.last_step, "error": f"{type(error).__name__}: {error}"[:MOST_OF_AN_ERROR]})
        if self.bar is not None:
            self.bar.stop()
        self.file.close()
        for write in self.writers:
            write(None)

    def _prometheus(self, run: Path, port: int, settings: Metrics) -> "Writer":
        endpoint = prometheus.Endpoint(run, port, settings)
        self.say(f"figures for Prometheus: {endpoint.address}")

        def write(record: Metrics | None) -> None:
            if record is None:
                endpoint.close()
                return
            endpoint.figures.take(record)

        return write

    def _write(self, record: Metrics) -> None:
        self.last_step = record["step"]
        self.file.write(json.dumps({**record, "time": round(time.time(), 3)}) + "\n")
        self.file.flush()
        for write in self.writers:
            write(record)


Writer = Callable[[Metrics | None], None]
"""Takes each record, and None at the end."""


def _tensorboard(first_step: int, run: Path, name: str, settings: Metrics) -> Writer:
    """Tells one history: what an earlier session, or the steps that were taken back, said of later steps is shown no more."""
    from torch.utils.tensorboard import SummaryWriter

    def after(step: int) -> Any:
        return SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    events = after(first_step)

    def write(record: Metrics | None) -> None:
        nonlocal events
        if record is None or ROLLED_BACK_FROM in record:
            events.close()
        if record is None:
            return
        if ROLLED_BACK_FROM in record:
            events = after(record["step"])
        for key, value in _numbers(record).items():
            events.add_scalar(key, value, record["step"])

    return write


def _wandb(run: Path, project: str, settings: Metrics) -> Writer:
    import wandb

    session = wandb.init(project=project, name=run.name, dir=str(run), config=settings, resume="allow")

    def write(record: Metrics | None) -> None:
        if record is None:
            session.finish()
            return
        session.log(_numbers(record), step=record["step"])

    return write


def _mlflow(run: Path, experiment: str, settings: Metrics) -> Writer:
    import mlflow

    mlflow.set_experiment(experiment)
    mlflow.start_run(run_name=run.name)
    mlflow.log_dict(settings, "config.json")

    def write(record: Metrics | None) -> None:
        if record is None:
            mlflow.end_run()
            return
        mlflow.log_metrics({key.replace("/", "."): value for key, value in _numbers(record).items()}, step=record["step"])

    return write


def _chosen_writers(config: LogConfig, first_step: int) -> list[tuple[Callable[[Path, str, Metrics], Writer], str]]:
    chosen: list[tuple[Callable[[Path, str, Metrics], Writer], str]] = []
    if config.tensorboard:
        chosen.append((partial(_tensorboard, first_step), ""))
    if config.wandb:
        chosen.append((_wandb, config.wandb))
    if config.mlflow:
        chosen.append((_mlflow, config.mlflow))
    return chosen


def check_writers(config: LogConfig) -> None:
    """Refuse a writer whose package is not installed, or whose port is taken, before any work is done. Errors: UserError."""
    import importlib.util

    for asked, package in ((config.tensorboard, "tensorboard"), (config.wandb, "wandb"), (config.mlflow, "mlflow")):
        if asked and importlib.util.find_spec(package) is None:
            raise UserError(f"log.{package} is set, but the package {package} is not installed; pip install {package}, or drop the key")
    if config.prometheus is None:
        return
    if importlib.util.find_spec("prometheus_client") is None:
        raise UserError("log.prometheus is set, but the package prometheus_client is not installed; pip install prometheus_client, or drop the key")
    if os.environ.get("RANK", "0") == "0":
        prometheus.check_port(config.prometheus)


def _numbers(record: Metrics) -> dict[str, float]:
    return {key: float(value) for key, value in record.items() if isinstance(value, int | float) and key != "step"}


def _line(step: int, total_steps: int, metrics: Metrics) -> str:
    parts = [f"step {step}/{total_steps}", f"loss {metrics['loss']:.4f}", f"lr {metrics['lr']:.2e}", f"grad norm {metrics['grad_norm']:.3f}"]
    parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
    if metrics.get("mfu") is not None:
        parts.append(f"MFU {100 * metrics['mfu']:.1f} % (causal)")
    waited = metrics["data_wait_seconds"] / metrics["seconds_per_step"]
    if waited > 0.01:
        parts.append(f"data wait {100 * waited:.1f} %")
    parts.append(f"ETA {_duration(metrics['eta_seconds'])}")
    return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _progress_bar(console: Console, first_step: int, total_steps: int) -> Progress:
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console)
    bar.add_task("training", total=total_steps, completed=first_step)
    bar.start()
    return bar


def read_records(run: Path) -> list[Metrics]:
    """The lines of a run's metrics so far."""
    return [json.loads(line) for line in (run / METRICS).read_text(encoding="utf-8").splitlines()]


def _drop_lines_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the last line of a killed run
            continue
        if record["step"] <= step:
            kept.append(line)
    write_atomic(path, "".join(line + "\n" for line in kept))
