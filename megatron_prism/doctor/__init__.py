"""`prism doctor`: whether this machine, its software and its folders can carry a run, one line a finding, each with its fix.

Owns: the findings, running each check in a process of its own under a time limit, the text and the JSON of a report. A check is a function from
`Asked` to findings (`CHECKS`); what it needs it imports itself, so this package imports neither torch nor the engine.
Refuses: unknown checks and devices, a single rank. Nothing here waits without a limit, and nothing is left in the folder that was tried.
"""

import difflib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Literal

from megatron_prism.errors import UserError

State = Literal["green", "yellow", "red"]
SCHEMA_VERSION = 1
CHECKS = {
    "software": 60,
    "gpu": 90,
    "gpu-packages": 60,
    "vllm": 90,
    "patches": 150,
    "disk": 60,
    "folder": 60,
    "limits": 30,
    "ranks": 150,
    "step": 240,
}
"""Check -> seconds that it may take. The functions are those of `checks`, `folder` and `compute`."""
OF_A_LAUNCH = frozenset({"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"})
"""Variables of torchrun that a check, started within a job, must not take for its own."""
AT_ONCE = 2
"""Checks that run side by side: most of their time is imports."""


@dataclass(frozen=True)
class Asked:
    """What a check is told. path: the folder that outputs go to; ranks: of the all-reduce; device: as a recipe's."""

    path: str
    ranks: int = 2
    device: str = "auto"


@dataclass(frozen=True)
class Finding:
    """One line. green: as it should be; yellow: works, slower or without an option; red: a run would fail. fix: a command, or what to do."""

    state: State
    name: str
    detail: str
    fix: str = ""


@dataclass(frozen=True)
class Checked:
    """The findings of one check, and what it took."""

    check: str
    findings: tuple[Finding, ...]
    seconds: float


def examine(asked: Asked, only: Sequence[str] = ()) -> Iterator[Checked]:
    """Run the checks, in order of CHECKS; each is given as soon as it and those before it are done. Errors: UserError for what cannot be asked.

    The folder is left to the checks: even looking at one on a dead server can take for ever.
    """
    for name in only:
        if name not in CHECKS:
            near = difflib.get_close_matches(name, CHECKS, n=1)
            raise UserError(f"--only {name}: there is no such check; " + (f"did you mean {near[0]}?" if near else f"checks: {', '.join(CHECKS)}"))
    if asked.ranks < 2 or asked.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--ranks {asked.ranks} --device {asked.device}: an all-reduce needs 2 ranks or more, and a device is auto, cpu or cuda")
    return _examine(asked, [name for name in CHECKS if not only or name in only])


def _examine(asked: Asked, names: list[str]) -> Iterator[Checked]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield from pool.map(lambda name: run_check(name, asked, CHECKS[name]), names)


def run_check(name: str, asked: Asked, limit_seconds: float) -> Checked:
    """One check in a process of its own, which is ended with all that it started when its time is over."""
    start = time.monotonic()
    command = [sys.executable, "-m", "megatron_prism.doctor.worker", name, json.dumps(asdict(asked))]
    ours = {name: value for name, value in os.environ.items() if name not in OF_A_LAUNCH}
    environment = {"OMP_NUM_THREADS": "1", **ours, "PYTHONSAFEPATH": "1"}
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, said = process.communicate(timeout=limit_seconds)
    except subprocess.TimeoutExpired:
        _end(process)
        found = [Finding("red", name, f"not done after {limit_seconds:g} seconds, and was stopped", f"prism doctor --only {name}")]
        return Checked(name, tuple(found), time.monotonic() - start)
    finally:
        _end(process)
    return Checked(name, _findings(name, process.returncode, output, said), time.monotonic() - start)


def _end(process: subprocess.Popen[str]) -> None:
    """End the check's whole session, its ranks too. A process that hangs in the kernel (a dead network folder) is not waited for."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        for stream in (process.stdout, process.stderr):
            if stream is not None and process.returncode is None:
                stream.close()
    try:
        process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        return


def _findings(name: str, status: int, output: str, said: str) -> tuple[Finding, ...]:
    try:
        return tuple(Finding(**finding) for finding in json.loads(output.splitlines()[-1]))
    except (IndexError, ValueError, TypeError):
        last = (said.strip().splitlines() or ["it said nothing"])[-1]
        return (
            Finding("red", name, f"the check itself failed with status {status}: {last}", f"python -m megatron_prism.doctor.worker {name} '{{}}'"),
        )


def is_well(checked: Sequence[Checked]) -> bool:
    """Whether nothing is red."""
    return all(finding.state != "red" for one in checked for finding in one.findings)


def as_json(checked: Sequence[Checked]) -> str:
    """The report for machines."""
    checks = [{"check": one.check, "seconds": round(one.seconds, 2), "findings": [asdict(finding) for finding in one.findings]} for one in checked]
    return json.dumps({"schema_version": SCHEMA_VERSION, "ok": is_well(checked), "checks": checks}, indent=1)
