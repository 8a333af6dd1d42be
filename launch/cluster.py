"""What a cluster wants to know beside the job itself: a small TOML file, written once and handed to every launch (`--cluster FILE`).

    partition = "gpu"
    account = "lab"
    setup = "module load cuda"
    venv = "/shared/prism/.venv"
    pass_env = ["WANDB_API_KEY"]             # names: values never stand in a script

    [partitions.gpu]                          # what a launch is checked against before it is queued
    max_hours = 24
    gpus_per_node = 8
    needs_account = true

Owns: the schema, and whether a job fits the place. Refuses: unknown keys, a container beside a virtual environment, variables that look like secrets,
jobs that the partition would never start.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_prism.config import Block, NonNegative, Positive, PositiveFloat, load_recipe
from megatron_prism.launch.job import Job

SECRET = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|KEY)(_|$)", re.IGNORECASE)
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Line = Annotated[str, Field(pattern=r"^[^\n\r\x00]+$")]
"""text that stands on one line of a script"""


class Partition(Block):
    """What one partition allows. What is not said is not checked."""

    max_hours: PositiveFloat | None = None
    """longest job"""
    max_nodes: Positive | None = None
    """most nodes of a job"""
    gpus_per_node: Positive | None = None
    """GPUs that each node has"""
    needs_account: bool = False
    """whether jobs without an account are turned away"""


class NemoConfig(Block):
    """For `prism launch nemo`: which of nemo-run's executors, and what it alone wants to know."""

    executor: Literal["local", "slurm", "skypilot"] = "local"
    """local: this machine; slurm: sbatch here or through ssh; skypilot: a cloud or Kubernetes (pip install nemo_run[skypilot])"""
    host: Line | None = None
    """slurm: login node to submit through, by ssh; none: the sbatch of this machine"""
    user: Line | None = None
    """slurm: user on the login node"""
    job_dir: Path | None = None
    """slurm: folder on the cluster for nemo-run's own files"""
    accelerator: Line | None = None
    """skypilot: kind of GPU, such as H200"""
    infra: Line | None = None
    """skypilot: where, such as k8s/my-context or aws/us-east-1"""


class ClusterConfig(Block):
    """A cluster file."""

    account: Line | None = None
    """account to charge"""
    partition: Line | None = None
    """partition to queue in"""
    partitions: Annotated[dict[str, Partition], Field(default_factory=dict)]
    """what partitions allow, by name: jobs are checked against it before they are queued"""
    cpus_per_node: Positive | None = None
    """cores to ask for on each node, shared out among its ranks; none: Slurm's own number"""
    starter: Literal["srun", "torchrun", "ft_launcher"] = "srun"
    """who starts the ranks: srun, which hands them signals and gives back their exit status, one torchrun on each node, or nvidia-resiliency-ext's
    ft_launcher (pip install nvidia-resiliency-ext on the nodes), which starts them again without leaving the job, up to `requeues` times"""
    container: Line | None = None
    """container image, for clusters with pyxis"""
    mounts: tuple[Line, ...] = ()
    """of the container: /outside:/inside[:ro]"""
    venv: Path | None = None
    """virtual environment on the nodes, activated before the job"""
    python: Line = "python"
    """interpreter on the nodes"""
    setup: str = ""
    """shell lines before the job, such as `module load cuda`, under `set -e`"""
    env: Annotated[dict[Name, Line], Field(default_factory=dict)]
    """variables of the job, which stand in the script"""
    pass_env: tuple[Name, ...] = ()
    """variables that the job takes over from where it is submitted: for secrets, whose values never stand in a script"""
    network_interface: Line | None = None
    """the interface that NCCL and gloo use between nodes, such as ib0 or ^lo,docker0; none: they find one"""
    timeout_minutes: Positive | None = None
    """how long the ranks of a process group wait for each other; none: 30. Not for `prism rl`, whose ranks wait for responses"""
    requeues: NonNegative = 3
    """how often a job that failed is queued again without progress: no newer checkpoint, or of a stage without any, no more in its output"""
    save_minutes: Positive = 10
    """how long before its time limit a job is told to save and stop; of a short one at half of it"""
    sbatch: tuple[Line, ...] = ()
    """more arguments of sbatch, such as --constraint=h200"""
    srun: tuple[Line, ...] = ()
    """more arguments of srun, such as --mpi=none"""
    nemo: NemoConfig = NemoConfig()
    """nemo-run"""

    @model_validator(mode="after")
    def _one_place_for_the_software(self) -> "ClusterConfig":
        if self.container and self.venv:
            raise ValueError(f"container={self.container} and venv={self.venv} are both set: the job runs in one of them; drop the other")
        if self.mounts and not self.container:
            raise ValueError(f"mounts={list(self.mounts)} are of a container, and none is set; set container, or drop mounts")
        return self

    @model_validator(mode="after")
    def _no_secrets_in_scripts(self) -> "ClusterConfig":
        secrets = [name for name in self.env if SECRET.search(name)]
        if secrets:
            names = ", ".join(f'"{name}"' for name in secrets)
            raise ValueError(f"env.{secrets[0]} looks like a secret and would stand in a script; name it alone: pass_env = [{names}]")
        return self

    @model_validator(mode="after")
    def _partition_is_known(self) -> "ClusterConfig":
        if self.partition and self.partitions and self.partition not in self.partitions:
            near = difflib.get_close_matches(self.partition, self.partitions, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(self.partitions)}"
            raise ValueError(f"partition={self.partition} is none of the partitions described here; {hint}")
        return self


def load_cluster(path: Path | None, **given: str | None) -> ClusterConfig:
    """A cluster file (None: the defaults), with what the command line gives winning over it. Errors: UserError."""
    return load_recipe(path, [f"{key}={value}" for key, value in given.items() if value is not None], ClusterConfig)


def problems(job: Job, cluster: ClusterConfig) -> list[str]:
    """Why this place would never start this job: each with the rule, the values, and the fix."""
    if cluster.partition is None or cluster.partition not in cluster.partitions:
        return []
    name, allows = f"partition {cluster.partition}", cluster.partitions[cluster.partition]
    found = []
    if allows.needs_account and cluster.account is None:
        found.append(f"account is missing: {name} takes no job without one (needs_account); set account in the cluster file, or --account")
    if allows.max_hours is not None and job.hours is not None and job.hours > allows.max_hours:
        found.append(
            f"hours={job.hours:g} is more than {name} allows (max_hours={allows.max_hours:g}); try hours={allows.max_hours:g}: "
            "a training run that its time limit stops has saved, and is queued again"
        )
    if allows.max_nodes is not None and job.nodes > allows.max_nodes:
        found.append(f"nodes={job.nodes} is more than {name} allows (max_nodes={allows.max_nodes}); try nodes={allows.max_nodes}")
    if allows.gpus_per_node is not None and (job.gpus_per_node or 0) > allows.gpus_per_node:
        nodes = -(-job.nodes * (job.gpus_per_node or 0) // allows.gpus_per_node)
        found.append(
            f"gpus={job.gpus_per_node} is more than a node of {name} has (gpus_per_node={allows.gpus_per_node}); "
            f"try nodes={nodes} gpus={allows.gpus_per_node}"
        )
    return found
