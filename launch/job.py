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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_prism import secrets
from megatron_prism.errors import ERROR_FILE, UserError
from megatron_prism.launch.child import Child

STOPPED_EARLY = 75
"""Exit status when a stage ended well before its work was done (a wall-clock limit): the same command continues it (sysexits' EX_TEMPFAIL)."""


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
    """How a job ended. status: 0, or a shell's exit status (2: bad input, 128 + n: ended by signal n). message: one line for people."""

    status: int
    message: str = ""


def prism_arguments(job: Job) -> list[str]:
    """The words after `prism` that run this stage in one process: `train recipe.toml train.steps=20`."""
    stage = ["stage", job.stage] if "." in job.stage else [job.stage]
    return [*stage, *([str(job.recipe)] if job.recipe else []), *job.overrides]


def process_argv(job: Job, python: str = sys.executable) -> list[str]:
    """The command of one process of a job, whoever tells it its rank."""
    return [python, "-m", "megatron_prism", *prism_arguments(job)]


def torchrun_argv(job: Job, rendezvous: Sequence[str] = ("--standalone",), python: str = sys.executable) -> list[str]:
    """torchrun's command line for one node. rendezvous: how the nodes find each other; the default is for one node alone."""
    assert job.nodes == 1 or tuple(rendezvous) != ("--standalone",), "several nodes need a rendezvous"
    launcher = [python, "-m", "torch.distributed.run", *rendezvous, "--max-restarts", "0", "--nproc-per-node", str(job.ranks_per_node)]
    return [*launcher, *process_argv(job)[1:]]


def environment(job: Job, base: Mapping[str, str] | None = None, cores: int | None = None) -> dict[str, str]:
    """The variables of a job's processes on one node: the caller's, ours, then the job's own.

    PYTHONSAFEPATH keeps the current folder off the import path, so that the folder `kernels` of a clone never shadows the package of that name.
    OMP_NUM_THREADS shares the cores out among the ranks, unless it is set already.
    """
    base = os.environ if base is None else base
    cores = len(os.sched_getaffinity(0)) if cores is None else cores
    threads = {"OMP_NUM_THREADS": str(max(1, cores // job.ranks_per_node))}
    return {**threads, **base, "PYTHONSAFEPATH": "1", **job.env}


def run_local(job: Job, log: Path) -> Outcome:
    """Run a job on this machine under torchrun; its output goes to our terminal and to the end of `log`. Errors: UserError for several nodes."""
    if job.nodes > 1:
        raise UserError(f"nodes={job.nodes}: this is one machine; drop nodes, or use prism launch slurm")
    argv = torchrun_argv(job)
    with tempfile.TemporaryDirectory(prefix="prism-") as folder:
        error_file = Path(folder) / "error"
        with Child(argv, {**environment(job), ERROR_FILE: str(error_file)}) as child:
            output = child.copy_output(log, title=shlex.join(map(secrets.mask, ["prism", *prism_arguments(job)])) + f"  # on {job.ranks} ranks")
            status = child.wait()
        if error_file.exists():
            return Outcome(2, error_file.read_text(encoding="utf-8"))
    return outcome_of(rank_status(output, status))


def rank_status(output: str, status: int) -> int:
    """The exit status of the rank that failed first, from the end of torchrun's output; torchrun itself answers 1 for all of them."""
    found = re.findall(r"exitcode\s*:\s*(-?\d+)", output)
    return int(found[-1]) if status == 1 and found else status


def outcome_of(status: int) -> Outcome:
    """A process's returncode as a shell's status, with what it means."""
    if status >= 0:
        return Outcome(status, f"exit status {status}" if status else "")
    name = signal.Signals(-status).name
    return Outcome(128 - status, f"ended by {name}" + (" (the kernel does this when memory runs out)" if -status == signal.SIGKILL else ""))
