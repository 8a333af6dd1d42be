"""One stage on some ranks, and the torchrun command line that starts it.

Owns: what a job is, torchrun's arguments, the environment of its processes, running one on this machine with a log.
Refuses: ranks that do not divide over the nodes. Slurm scripts and nemo-run experiments are made from the same `Job` beside this file, and from what
a cluster file (launch/cluster.py) says of the place.
"""

import os
import re
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import typer

from megatron_prism import secrets
from megatron_prism.config import SAVE_SECONDS
from megatron_prism.errors import ERROR_FILE, NEVER_AGAIN, STOPPED_EARLY, STOPPED_FILE, UserError
from megatron_prism.launch.child import Child
from megatron_prism.launch.progress import Failures

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""what asks a run to save and stop; torchrun by itself would die of the last two, and take its ranks along"""
SECONDS_MORE = 30.0
"""a job that fails again without progress waits so much longer each time: what ails a disk or a device has time to pass"""
SECONDS_TO_SAVE = 300
"""how long torchrun waits for its ranks after such a signal before it kills them; its own is 30"""

KILLED = " (the kernel does this when memory runs out; a rank's guard where Python hangs, and says so in the log)"
NEVER_SECONDS = "1000000000"


@dataclass(frozen=True)
class Job:
    """A stage, its recipe and overrides, and what it runs on. ranks: processes in all, spread evenly over the nodes, one for each GPU.

    gpus_per_node: GPUs to ask for; None where nodes come whole, or without any. hours: the wall-clock limit to ask for; None is the place's own.
    """

    stage: str
    recipe: Path | None = None
    overrides: tuple[str, ...] = ()
    ranks: int = 1
    nodes: int = 1
    gpus_per_node: int | None = None
    hours: float | None = None
    env: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.ranks < 1 or self.ranks % self.nodes:
            raise UserError(f"ranks={self.ranks} must be a positive multiple of nodes={self.nodes}: every node starts the same number of processes")

    @property
    def ranks_per_node(self) -> int:
        """Processes that one node starts."""
        return self.ranks // self.nodes


@dataclass(frozen=True)
class Outcome:
    """How a job ended. status: 0, or a shell's exit status (2: bad input, 128 + n: ended by signal n). message: one line for people.

    is_certain: started again it would come to the same, whatever went well before.
    """

    status: int
    message: str = ""
    is_certain: bool = False


def prism_arguments(job: Job) -> list[str]:
    """The words after `prism` that run this stage in one process: `train recipe.toml train.steps=20`."""
    stage = ["stage", job.stage] if "." in job.stage else [job.stage]
    return [*stage, *([str(job.recipe)] if job.recipe else []), *job.overrides]


def process_argv(job: Job, python: str = sys.executable) -> list[str]:
    """The command of one process of a job, whoever tells it its rank."""
    return [python, "-m", "megatron_prism", *prism_arguments(job)]


def torchrun_argv(job: Job, rendezvous: Sequence[str] = ("--standalone",), python: str = sys.executable) -> list[str]:
    """torchrun's command line for one node. rendezvous: how the nodes find each other; the default is for one node alone."""
    return _elastic_argv(job, [python, "-m", "torch.distributed.run"], rendezvous, restarts=0)


def ft_launcher_argv(job: Job, rendezvous: Sequence[str], python: str, restarts: int) -> list[str]:
    """The same under nvidia-resiliency-ext's launcher, which starts the ranks again within the job. Its heartbeats are off."""
    never = ["--ft-initial-rank-heartbeat-timeout", NEVER_SECONDS, "--ft-rank-heartbeat-timeout", NEVER_SECONDS]  # its command line has no "off"
    return _elastic_argv(job, [python, "-m", "nvidia_resiliency_ext.fault_tolerance.launcher", *never], rendezvous, restarts)


def _elastic_argv(job: Job, launcher: list[str], rendezvous: Sequence[str], restarts: int) -> list[str]:
    assert job.nodes == 1 or tuple(rendezvous) != ("--standalone",), "several nodes need a rendezvous"
    return [*launcher, *rendezvous, "--max-restarts", str(restarts), "--nproc-per-node", str(job.ranks_per_node), *process_argv(job)[1:]]


def environment(job: Job, base: Mapping[str, str] | None = None, cores: int | None = None) -> dict[str, str]:
    """The variables of a job's processes on one node: the caller's, ours, then the job's own.

    PYTHONSAFEPATH keeps the current folder off the import path, so that the folder `kernels` of a clone never shadows the package of that name.
    OMP_NUM_THREADS shares the cores out among the ranks, unless it is set already.
    """
    base = os.environ if base is None else base
    cores = len(os.sched_getaffinity(0)) if cores is None else cores
    threads = {"OMP_NUM_THREADS": str(max(1, cores // job.ranks_per_node))}
    return {**threads, **base, "PYTHONSAFEPATH": "1", **job.env}


def torchrun_variables(seconds_to_save: int = SECONDS_TO_SAVE) -> dict[str, str]:
    """What torchrun is told by its environment alone: the signals that it hands on, and how long it then waits before it kills its ranks."""
    handed_on = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, *STOP_SIGNALS)
    seconds = str(seconds_to_save)
    return {"PET_SIGNALS_TO_HANDLE": ",".join(sign.name for sign in handed_on), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": seconds, SAVE_SECONDS: seconds}


def run_local(job: Job, log: Path, output: Path | None = None, restarts: int = 0) -> Outcome:
    """Run a job on this machine under torchrun; its output goes to our terminal and to the end of `log`. Errors: UserError for several nodes.

    restarts: how often it is started again when it failed, without progress in `output` between: one that makes progress goes on for ever.
    What was told to stop never is, also where the word came before there was anything to save. Bad input is not in the first start, which somebody
    watches; later it may be a fault that passes, and counts as a failure, unless it is certain to come again.
    """
    if job.nodes > 1:
        raise UserError(f"nodes={job.nodes}: this is one machine; drop nodes, or use prism launch slurm")
    failures = Failures(job.stage, output)
    told: list[int] = []
    while True:
        began = time.monotonic()
        outcome = _run_once(job, log, told)
        if told or outcome.status in (0, STOPPED_EARLY) or outcome.is_certain or (outcome.status == 2 and not failures.times):
            return outcome
        failures.note(time.monotonic() - began)
        if failures.is_over(restarts):
            return outcome
        typer.secho(f"failed ({outcome.message}); start {failures.times} of at most {restarts} at {failures.place}", fg="yellow", err=True)
        time.sleep(SECONDS_MORE * (failures.times - 1))


def _run_once(job: Job, log: Path, told: list[int]) -> Outcome:
    title = shlex.join(map(secrets.mask, ["prism", *prism_arguments(job)])) + f"  # on {job.ranks} ranks"
    with tempfile.TemporaryDirectory(prefix="prism-") as folder:
        error, stopped = Path(folder) / "error", Path(folder) / "stopped"
        ours = {ERROR_FILE: str(error), STOPPED_FILE: str(stopped)}
        with Child(torchrun_argv(job), {**torchrun_variables(), **environment(job), **ours}) as child, _handing_on(child, told):
            output = child.copy_output(log, title)
            status = child.wait()
        if error.exists():
            return Outcome(2, error.read_text(encoding="utf-8"), is_certain=error.with_name(error.name + NEVER_AGAIN).exists())
        if stopped.exists():
            return Outcome(STOPPED_EARLY, stopped.read_text(encoding="utf-8").strip())
    return outcome_of(rank_status(output, status))


@contextmanager
def _handing_on(child: Child, told: list[int]) -> Iterator[None]:
    """Inside, what asks us to stop asks the ranks, by the signal that every torchrun hands on: they save, and their status is ours.

    told: gets each such signal. Only where signals can be heard: in the main thread.
    """

    def hand_on(number: int, _: object) -> None:
        told.append(number)
        child.process.terminate()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {sign: signal.signal(sign, hand_on) for sign in STOP_SIGNALS}
    try:
        yield
    finally:
        for sign, handler in previous.items():
            signal.signal(sign, handler)


def rank_status(output: str, status: int) -> int:
    """The exit status of the rank that failed first, from the end of torchrun's output; torchrun itself answers 1 for all of them."""
    found = re.findall(r"exitcode\s*:\s*(-?\d+)", output)
    return int(found[-1]) if status == 1 and found else status


def outcome_of(status: int) -> Outcome:
    """A process's returncode as a shell's status, with what it means."""
    if status >= 0:
        return Outcome(status, f"exit status {status}" if status else "")
    name = signal.Signals(-status).name
    return Outcome(128 - status, f"ended by {name}" + (KILLED if -status == signal.SIGKILL else ""))
