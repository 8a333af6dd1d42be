"""A job as an sbatch script: plain text that a person can read, keep and change; and handing it to Slurm.

The ranks are started by srun itself, or by one torchrun on each node. They meet at the first node of the allocation, at the address by which Slurm
reaches it. What follows from each end of a job stands in launch/ending.py.
Beside the OUTPUT of a job lie OUTPUT.sbatch, OUTPUT.log, OUTPUT.job (its number), OUTPUT.failures (where it failed), and while it runs
OUTPUT.NUMBER.error (a message for people) and OUTPUT.NUMBER.stopped (it was told to stop), of its own so that no other job's are taken for them.
Refuses: line breaks in what would stand in the script, a second job for an output; what a partition allows is checked in launch/cluster.py.
"""

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from megatron_prism.artifact import write_atomic
from megatron_prism.config import SAVE_SECONDS, TIMEOUT_MINUTES
from megatron_prism.errors import ERROR_FILE, STOPPED_FILE, MachineError, UserError
from megatron_prism.launch import ending
from megatron_prism.launch.cluster import ClusterConfig
from megatron_prism.launch.job import Job, environment, ft_launcher_argv, process_argv, torchrun_argv, torchrun_variables

RENDEZVOUS = ("--nnodes", "$SLURM_NNODES", "--rdzv-backend", "c10d", "--rdzv-endpoint", "$MASTER_ADDR:$MASTER_PORT", "--rdzv-id", "$SLURM_JOB_ID")
QUOTED_BY_HAND = frozenset(word for word in RENDEZVOUS if "$" in word)
RANK_OF_SRUN = 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_STEP_NUM_TASKS LOCAL_WORLD_SIZE={ranks}; exec "$@"'

# The port is one that two jobs on one node do not share, as far as their numbers differ; below the range the kernel hands out by itself.
MEETING = """\
hosts=$(patiently scontrol show hostnames "$SLURM_JOB_NODELIST")
node=$(patiently scontrol --oneliner show node "${hosts%%$'\\n'*}")
MASTER_ADDR=$(sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p' <<< "$node")
MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
export MASTER_ADDR=${MASTER_ADDR:?Slurm does not say where the first node is} MASTER_PORT"""


def beside(output: Path, suffix: str) -> Path:
    """A file about an output, beside its folder, which holds nothing but the artifact."""
    return output.with_name(output.name + suffix)


def sbatch_script(job: Job, cluster: ClusterConfig, name: str, output: Path) -> str:
    """The text of the script. name: shown by squeue. output: the job's output folder, relative to where sbatch is called.

    Errors: UserError for a line break in a path, a name or an override.
    """
    _refuse_line_breaks([name, str(output), *process_argv(job), *job.env, *job.env.values()])
    parts = [
        "#!/bin/bash",
        *_directives(job, cluster, name, beside(output, ".log")),
        "",
        f"readonly PRISM_OUTPUT={shlex.quote(str(output))} PRISM_REQUEUES={cluster.requeues}",
        f'export {ERROR_FILE}="$PRISM_OUTPUT.$SLURM_JOB_ID.error" {STOPPED_FILE}="$PRISM_OUTPUT.$SLURM_JOB_ID.stopped"',
        ending.ALONE,
        ending.functions(job.stage),
        "",
        "(  # a shell of its own: what is set, changed or trapped from here on does not reach the end above",
        "set -e",
        *setup_lines(cluster),
        *map(_required, cluster.pass_env),
        *_exports(job, cluster),
        *([MEETING] if job.ranks > 1 else []),
        "",
        _start(job, cluster),
        ") &",
        "wait $!  # in the background, so that this script hears what Slurm says to it",
    ]
    return "\n".join(parts) + "\n"


def submit(script: Path, after: Sequence[str] = ()) -> str:
    """Queue a script behind the jobs `after`; the number of the new job. Errors: UserError where there is no sbatch, or with what it says."""
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not on PATH: this machine is no login node of a Slurm cluster; use --print, and sbatch the script there")
    done = subprocess.run(submission(script, after), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"sbatch refused {script}: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


def submission(script: Path | str, after: Sequence[str] = ()) -> list[str]:
    """sbatch's words. A job whose predecessor failed for good is cancelled, not left waiting for ever."""
    dependency = [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
    return ["sbatch", "--parsable", *dependency, str(script)]


def queued(output: Path) -> str | None:
    """The number of the job that makes this output, if Slurm still has it. Errors: MachineError where Slurm does not answer."""
    record = beside(output, ".job")
    if not record.exists() or shutil.which("squeue") is None:
        return None
    number = record.read_text().strip()
    if not number.isdecimal():  # it was cut short; of "" squeue would answer for no job
        return None
    words = ["squeue", "--noheader", "--states=PENDING,RUNNING,SUSPENDED", f"--jobs={number}"]
    found = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if found.returncode and "invalid job id" not in found.stderr.lower():
        raise MachineError(
            f"squeue does not say whether job {number} still makes {output} ({found.stderr.strip() or f'status {found.returncode}'}), "
            f"and a second job would be in its way: try again when it answers, or remove {record} if that job is gone"
        )
    return number if found.stdout.strip() else None


def enqueue(text: str, output: Path, after: Sequence[str]) -> str:
    """Write the script beside its output, submit it, and keep the job's number there."""
    script = beside(output, ".sbatch")
    script.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(script, text)
    beside(output, ".failures").unlink(missing_ok=True)  # whoever submits again has mended what failed
    number = submit(script, after)
    write_atomic(beside(output, ".job"), number + "\n")
    return number


def _directives(job: Job, cluster: ClusterConfig, name: str, log: Path) -> list[str]:
    wanted = {
        "job-name": name,
        "nodes": job.nodes,
        "ntasks-per-node": _tasks(job, cluster),
        "gpus-per-node": job.gpus_per_node or None,
        "cpus-per-task": _cores(job, cluster),
        "time": None if job.hours is None else clock(job.hours),
        "signal": f"TERM@{_warned_seconds(job, cluster)}",
        "account": cluster.account,
        "partition": cluster.partition,
        "output": str(log).replace("%", "%%"),
        "open-mode": "append",
        "export": "ALL",
    }
    found = [f"--{key}={shlex.quote(str(value))}" for key, value in wanted.items() if value is not None]
    return [f"#SBATCH {word}" for word in [*found, "--requeue", *map(shlex.quote, cluster.sbatch)]]


def _warned_seconds(job: Job, cluster: ClusterConfig) -> int:
    """How long before its limit Slurm tells the job to stop; of a short job half of it. Without hours the limit is the partition's."""
    place = cluster.partitions.get(cluster.partition or "")
    hours = job.hours or (place.max_hours if place else None)
    return 60 * cluster.save_minutes if hours is None else min(60 * cluster.save_minutes, max(1, round(1800 * hours)))


def _tasks(job: Job, cluster: ClusterConfig) -> int:
    """Tasks of srun on each node."""
    return job.ranks_per_node if cluster.starter == "srun" else 1


def _cores(job: Job, cluster: ClusterConfig) -> int | None:
    """Cores of each task."""
    return max(1, cluster.cpus_per_node // _tasks(job, cluster)) if cluster.cpus_per_node else None


def setup_lines(cluster: ClusterConfig) -> list[str]:
    """Shell lines before the job: the cluster's own, and the virtual environment."""
    activation = [f"source {shlex.quote(str(cluster.venv / 'bin/activate'))}"] if cluster.venv else []
    return [*cluster.setup.splitlines(), *activation]


def _required(name: str) -> str:
    """That a variable which is passed on is there: queued again, the job would not have it either."""
    return f'[[ ${{{name}:-}} ]] || {{ echo "error: {name} is not set; export it where the job is submitted" | tee "${ERROR_FILE}" >&2; exit 2; }}'


def job_variables(cluster: ClusterConfig) -> dict[str, str]:
    """The variables that a cluster file asks for."""
    found = dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), cluster.network_interface) if cluster.network_interface else {}
    if cluster.timeout_minutes:
        found[TIMEOUT_MINUTES] = str(cluster.timeout_minutes)
    return {**found, **cluster.env}


def _exports(job: Job, cluster: ClusterConfig) -> list[str]:
    warned = _warned_seconds(job, cluster)
    ours = {SAVE_SECONDS: str(warned)}
    if cluster.starter != "srun":
        ours |= torchrun_variables(max(30, warned - 30))
    values = environment(job, base={**ours, **job_variables(cluster)}, cores=cluster.cpus_per_node or job.ranks_per_node)
    return [f"export {key}={shlex.quote(value)}" for key, value in sorted(values.items())]


def _start(job: Job, cluster: ClusterConfig) -> str:
    """The srun command."""
    words = ["srun", f"--ntasks-per-node={_tasks(job, cluster)}", "--kill-on-bad-exit=1"]
    cores = _cores(job, cluster)
    words += [f"--cpus-per-task={cores}"] if cores else []  # srun no longer takes it over from sbatch
    if cluster.container:
        words += [f"--container-image={cluster.container}", f"--container-workdir={Path.cwd()}"]
        words += [f"--container-mounts={','.join(cluster.mounts)}"] if cluster.mounts else []
    words += cluster.srun
    if job.ranks > 1 and cluster.starter == "srun":
        started = ["bash", "-c", RANK_OF_SRUN.format(ranks=job.ranks_per_node), "rank", *process_argv(job, cluster.python)]
    elif job.ranks > 1 and cluster.starter == "ft_launcher":
        started = ft_launcher_argv(job, RENDEZVOUS, cluster.python, cluster.requeues)
    elif job.ranks > 1:
        started = torchrun_argv(job, RENDEZVOUS, cluster.python)
    else:
        started = process_argv(job, cluster.python)
    return f"{' '.join(map(shlex.quote, words))} \\\n  {_continued([_quoted(word) for word in started])}"


def clock(hours: float) -> str:
    """Hours as sbatch reads them."""
    minutes = max(1, round(hours * 60))
    return f"{minutes // 60:02d}:{minutes % 60:02d}:00"


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


def _refuse_line_breaks(words: Sequence[str]) -> None:
    for word in words:
        if "\n" in word or "\r" in word:
            raise UserError(f"{word!r} has a line break, which a script's lines cannot hold; rename it")
