"""The folder of a chain of stages: each stage's output, and what `prism run` and `prism launch slurm` recorded of the chain (OUTPUT/pipeline.json).

Without the record, such as after a chain of jobs of one's own, the outputs in the folder stand for the stages, in the order in which they were begun.
Owns: which stage is waiting, which failed. Refuses: nothing; a record that cannot be read counts as none.
"""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_prism.status import life
from megatron_prism.status.outputs import read_json
from megatron_prism.status.run import time_of
from megatron_prism.status.said import Status

RECORD = "pipeline.json"
Read = Callable[[Path, float], Status]


def stage_folders(folder: Path) -> list[Path]:
    """The outputs that lie in a folder."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and (path / life.PROVENANCE).is_file() and not path.name.startswith("."))


def status(folder: Path, read: Read, now: float) -> Status:
    """The chain, and of each stage its own status. read: says what one output is."""
    record = read_json(folder / RECORD)
    stages = [stage for stage in record.get("stages") or [] if isinstance(stage, dict) and "output" in stage]
    one = Status(folder.name, folder, "pipeline", "running", unit="stages")
    known = {str(stage["output"]) for stage in stages}
    runner = _runner(record)
    one.parts = [_stage(folder / str(stage["output"]), stage, runner, read, now) for stage in stages]
    others = [read(path, now) for path in stage_folders(folder) if path.name not in known]
    one.parts += others if not stages else []
    one.parts = one.parts if stages else sorted(one.parts, key=lambda part: str(part.where.get("first_began") or part.where.get("began") or ""))
    one.done, one.total = sum(part.state == "finished" for part in one.parts), len(one.parts)
    one.where = {key: value for key, value in (("host", record.get("host")), ("pipeline", record.get("pipeline"))) if value is not None}
    _judge(one, runner)
    return one


def _runner(record: dict[str, Any]) -> bool | None:
    """Whether the `prism run` that wrote the record is still there; None where that cannot be told from this machine."""
    process = record.get("process")
    if not isinstance(process, dict) or record.get("host") != socket.gethostname() or process.get("started") is None:
        return None
    return life.is_process(int(process["pid"]), float(process["started"]))


def _stage(output: Path, stage: dict[str, Any], runner: bool | None, read: Read, now: float) -> Status:
    said = stage.get("state")
    if not (output / life.PROVENANCE).is_file():
        found = Status(output.name, output, str(stage.get("stage")), "waiting")
        if said == "running" and runner is not False:
            found.state, found.why = "starting", "nothing of it is on disk yet"
    else:
        found = read(output, now)
    found.name = str(stage.get("name", found.name))
    if said in ("failed", "stopped") and found.state != "finished" and not _begun_since(found, stage):
        found.state, found.why = said, _failure(stage, output)
    elif said == "running" and found.state in ("dead", "running", "starting") and runner is not None:
        found.state = "dead" if not runner else found.state if found.state != "dead" else "running"
        found.why = found.why if runner else "the prism run that ran it is gone: start it again to go on"
    return found


def _begun_since(found: Status, stage: dict[str, Any]) -> bool:
    """Whether somebody started the stage again, alone, after the chain had ended at it."""
    began, ended = time_of(found.where.get("began")), stage.get("time")
    return began is not None and isinstance(ended, int | float) and began > ended


def _failure(stage: dict[str, Any], output: Path) -> str:
    message = str(stage.get("message") or "").splitlines()
    return f"status {stage.get('status')}" + (f": {message[0]}" if message else "") + f"; its output: {output.with_name(output.name + '.log')}"


def _judge(one: Status, runner: bool | None) -> None:
    """The chain's state, from its stages'."""
    states = [part.state for part in one.parts]
    for state in ("failed", "dead", "unreadable", "running", "starting", "stopped"):
        if state in states:
            names = [part.name for part in one.parts if part.state == state]
            one.state, one.why = state, f"at {', '.join(names)}"
            return
    if states and all(state == "finished" for state in states):
        one.state = "finished"
    elif runner:
        one.state, one.why = "running", "between two stages"
    else:
        one.state, one.why = "stopped", "no stage is at work: start the pipeline again to go on"
