"""What `prism run` and `prism launch slurm` leave for `prism status`: OUTPUT/pipeline.json, where OUTPUT is the folder that the stages write to.

Owns: its schema; it is written whole at every change and never read to decide what is run. Refuses nothing: a chain whose outputs lie in several
folders has no such file.
"""

import json
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_prism.artifact import write_atomic
from megatron_prism.launch.plan import Step

FILE = "pipeline.json"
SCHEMA_VERSION = 1


class Record:
    """The record of a chain that is started. runner: this process runs its stages itself, rather than a queue."""

    def __init__(self, pipeline: Path, plan: Sequence[Step], runner: bool) -> None:
        folders = {step.output.absolute().parent for step in plan}
        self.path = folders.pop() / FILE if len(folders) == 1 else None
        self.stages: dict[str, dict[str, Any]] = {
            step.name: {"name": step.name, "stage": step.job.stage, "output": step.output.name, "ranks": step.job.ranks} for step in plan
        }
        self.facts: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "pipeline": str(pipeline),
            "host": socket.gethostname(),
            "started": time.time(),
        }
        if runner:
            self.facts["process"] = {"pid": os.getpid(), "started": _ticks()}

    def write(self, step: Step | None = None, **facts: Any) -> None:
        """Keep it; of a stage, what there is to say of it now."""
        if step is not None:
            stage = self.stages[step.name]
            self.stages[step.name] = {key: stage[key] for key in ("name", "stage", "output", "ranks")} | {**facts, "time": time.time()}
        if self.path is not None:
            write_atomic(self.path, json.dumps({**self.facts, "stages": list(self.stages.values())}, indent=1) + "\n")


def _ticks() -> float | None:
    """When this process began, in clock ticks since boot, which tells it from a later one of its number; None without /proc."""
    try:
        return float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
