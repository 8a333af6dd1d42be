"""What a run says about itself: `metrics.jsonl` always, trackers and Prometheus when asked, and one line for people.

Called on rank 0 only; the other ranks get a log that says nothing.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_prism.artifact import write_atomic
from megatron_prism.engine import prometheus, trackers
from megatron_prism.engine.log_settings import LogConfig
from megatron_prism.errors import UserError

METRICS = "metrics.jsonl"
MOST_OF_AN_ERROR = 2000
"""characters"""
Metrics = dict[str, Any]


class MetricsLog:
    """One run's metrics. Lines beyond the step that a run resumes from are dropped, so that the file tells one history.

    Errors: UserError where the run begins, for a tracker that cannot be reached, or a port of `log.prometheus` that is taken.
    """

    def __init__(self, run: Path, config: LogConfig, first_step: int, total_steps: int, enabled: bool, settings: Metrics) -> None:
        self.enabled = enabled
        if not enabled:
            return
        self.path, self.last_step, self.console = run / METRICS, first_step, Console(file=sys.stderr)
        begins = not self.path.exists()
        self.endpoint = self._endpoint(run, config.prometheus, settings, begins)  # first: it may be refused
        self.trackers = trackers.start(config, run, first_step, settings, begins)
        _drop_lines_after(self.path, first_step)
        self.file = self.path.open("a", encoding="utf-8")
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
        """Drop the lines beyond a step that the run goes back to: the file tells one history. Trackers hear of it by a record of ROLLED_BACK_FROM."""
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
        failed = isinstance(error, Exception | KeyboardInterrupt)
        if failed and not self.file.closed:
            self._write({"step": self.last_step, "error": f"{type(error).__name__}: {error}"[:MOST_OF_AN_ERROR]})
        if self.bar is not None:
            self.bar.stop()
        self.file.close()
        if self.endpoint is not None:
            self.endpoint.close()
        trackers.end(self.trackers, failed)

    def _endpoint(self, run: Path, port: int | None, settings: Metrics, begins: bool) -> prometheus.Endpoint | None:
        """Monitoring ends no run that has begun: on a machine where its port is taken it is another one."""
        if port is None:
            return None
        try:
            endpoint = prometheus.Endpoint(run, port, settings)
        except UserError as error:
            if begins:
                raise
            self.say(f"{error}; the run goes on with a free port")
            endpoint = prometheus.Endpoint(run, 0, settings)
        self.say(f"figures for Prometheus: {endpoint.address}")
        return endpoint

    def _write(self, record: Metrics) -> None:
        self.last_step = record["step"]
        self.file.write(json.dumps({**record, "time": round(time.time(), 3)}) + "\n")
        self.file.flush()
        if self.endpoint is not None:
            self.endpoint.figures.take(record)
        for tracker in self.trackers:
            tracker.tell(record)


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
