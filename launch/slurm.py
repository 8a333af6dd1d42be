"""A job as an sbatch script: plain text that a person can read, keep and change.

One srun task a node, each a torchrun that starts the node's ranks; they meet at the first node of the allocation. No container is needed.
Refuses: nothing of its own; Slurm's limits are Slurm's to say. `sbatch SCRIPT` submits it; the log lies beside it.
"""

import shlex
from pathlib import Path
from typing import Annotated

from pydantic import Field

from megatron_prism.config import Block, Positive
from megatron_prism.launch.job import Job, environment, torchrun_argv

# A port that two jobs on one node do not share, as far as their numbers differ; below the range the kernel hands out by itself.
RENDEZVOUS = ("--nnodes", "$SLURM_NNODES", "--rdzv-backend", "c10d", "--rdzv-endpoint", "$head:$port", "--rdzv-id", "$SLURM_JOB_ID")
QUOTED_BY_HAND = frozenset(RENDEZVOUS[1::2]) - {"c10d"}


class SlurmConfig(Block):
    """What a cluster wants to know beside the job itself."""

    time: Annotated[str, Field(pattern=r"^(\d+-)?\d{1,3}(:\d{2}){0,2}$")] = "04:00:00"
    """wall-clock limit, as sbatch reads it; give the recipe a shorter one, so that the run saves before Slurm ends it"""
    account: str | None = None
    """account to charge"""
    partition: str | None = None
    """partition to queue in"""
    gpus_per_node: Positive | None = None
    """GPUs to ask for on each node; none where nodes come whole, or for a CPU job"""
    cpus_per_node: Positive | None = None
    """cores to ask for on each node; shared out among its ranks"""
    srun: tuple[str, ...] = ()
    """more arguments of srun, such as --container-image=... or --mpi=pmix"""
    setup: str = ""
    """shell lines before the job, such as `module load cuda` or the activation of an environment"""
    python: str = "python"
    """interpreter on the nodes"""


def sbatch_script(job: Job, cluster: SlurmConfig, name: str, log_folder: Path = Path("runs/slurm")) -> str:
    """The text of the script. name: shown by squeue. log_folder: relative to where sbatch is called; it must exist then."""
    exports = environment(job, base={}, cores=cluster.cpus_per_node or job.ranks_per_node)
    command = _continued([_quoted(word) for word in torchrun_argv(job, RENDEZVOUS, cluster.python)])
    srun = " ".join(["srun", "--ntasks-per-node=1", "--kill-on-bad-exit=1", *(shlex.quote(word) for word in cluster.srun)])
    parts = [
        "#!/bin/bash",
        *_directives(job, cluster, name, log_folder),
        "",
        "set -euo pipefail",
        *cluster.setup.splitlines(),
        *(f"export {key}={shlex.quote(value)}" for key, value in sorted(exports.items())),
        "",
        'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "port=$((20000 + SLURM_JOB_ID % 12000))",
        "",
        f"{srun} \\\n  {command}",
    ]
    return "\n".join(parts) + "\n"


def _directives(job: Job, cluster: SlurmConfig, name: str, log_folder: Path) -> list[str]:
    wanted = {
        "job-name": name,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": cluster.gpus_per_node,
        "cpus-per-task": cluster.cpus_per_node,
        "time": cluster.time,
        "account": cluster.account,
        "partition": cluster.partition,
        "output": log_folder / f"{name}-%j.log",
    }
    return [f"#SBATCH --{key}={value}" for key, value in wanted.items() if value is not None]


def _quoted(word: str) -> str:
    """Quoted for the shell; our own variables stay variables."""
    return f'"{word}"' if word in QUOTED_BY_HAND else shlex.quote(word)


def _continued(words: list[str]) -> str:
    """One line for each option of a long command."""
    lines: list[str] = []
    for word in words:
        if lines and not word.startswith("-"):
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return " \\\n    ".join(lines)
