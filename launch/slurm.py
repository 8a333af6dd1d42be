"""A job as an sbatch script: plain text that a person can read, keep and change; and handing it to Slurm.

The ranks are started by srun itself, or by one torchrun on each node. They meet at the first node of the allocation, at the address by which Slurm
reaches it. A job that its time limit stops, or that failed otherwise than by bad input, is queued again and goes on from its newest checkpoint.
Beside the OUTPUT of a job lie OUTPUT.sbatch, OUTPUT.log, OUTPUT.job (its number), OUTPUT.error (a message for people), OUTPUT.stopped (it was
told to stop) and OUTPUT.failures (the checkpoints after which it failed). Refuses: line breaks in what would stand in the script; what a partition
allows is checked in launch/cluster.py.
"""

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from megatron_prism.artifact import COMPLETE, write_atomic
from megatron_prism.config import SAVE_SECONDS, TIMEOUT_MINUTES
from megatron_prism.errors import ERROR_FILE, STOPPED_FILE, UserError
from megatron_prism.launch.cluster import ClusterConfig
from megatron_prism.launch.job import STOPPED_EARLY, Job, environment, ft_launcher_argv, process_argv, torchrun_argv, torchrun_variables

RENDEZVOUS = ("--nnodes", "$SLURM_NNODES", "--rdzv-backend", "c10d", "--rdzv-endpoint", "$MASTER_ADDR:$MASTER_PORT", "--rdzv-id", "$SLURM_JOB_ID")
QUOTED_BY_HAND = frozenset(word for word in RENDEZVOUS if "$" in word)
RANK_OF_SRUN = 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_STEP_NUM_TASKS LOCAL_WORLD_SIZE={ranks}; exec "$@"'

# The port is one that two jobs on one node do not share, as far as their numbers differ; below the range the kernel hands out by itself.
MEETING = """\
read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p')
MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
export MASTER_ADDR MASTER_PORT"""

ENDING = """\
[[ ! -e {stopped} ]] || status={early}  # it was told to stop, and has saved
[[ ! -e {error} ]] || status=2  # bad input: its message is above
((status)) || [[ -e {output}/{complete} ]] || status={early}  # it ended well, before its work was done
# a job that Slurm itself has queued again, because a node was lost, is left alone
if ((status != 0 && status != 2)) && [[ $(scontrol --oneliner show job "$SLURM_JOB_ID") == *" Restarts=${{SLURM_RESTART_COUNT:-0}} "* ]]; then
  place=$(ls -1d {output}/checkpoints/step_????????/{complete} 2>/dev/null | tail -n 1) || true
  echo "after ${{place:-nothing}}" >> {failures}
  times=$(grep -cxF "after ${{place:-nothing}}" {failures})
  echo "status $status, $times times now after ${{place:-nothing}}" >&2
  if ((times <= {requeues})); then scontrol requeue "$SLURM_JOB_ID" && sleep 60; fi  # until Slurm ends this script
fi
exit "$status\""""


def beside(output: Path, suffix: str) -> Path:
    """A file about an output, beside its folder, which holds nothing but the artifact."""
    return output.with_name(output.name + suffix)


def sbatch_script(job: Job, cluster: ClusterConfig, name: str, output: Path) -> str:
    """The text of the script. name: shown by squeue. output: the job's output folder, relative to where sbatch is called.

    Errors: UserError for a line break in a path, a name or an override.
    """
    _refuse_line_breaks([name, str(output), *process_argv(job), *job.env, *job.env.values()])
    settings: dict[str, str | int] = {key: shlex.quote(str(beside(output, f".{key}"))) for key in ("error", "failures", "stopped")}
    settings |= {"output": shlex.quote(str(output)), "complete": COMPLETE, "early": STOPPED_EARLY, "requeues": cluster.requeues}
    parts = [
        "#!/bin/bash",
        *_directives(job, cluster, name, beside(output, ".log")),
        "",
        "set -euo pipefail",
        *setup_lines(cluster),
        *_exports(job, cluster, output),
        *([MEETING] if job.ranks > 1 else []),
        "",
        f"rm -f {settings['error']} {settings['stopped']}",
        "status=0",
        f"{_start(job, cluster)} || status=$?",
        "",
        ENDING.format(**settings),
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
    """The number of the job that makes this output, if Slurm still has it."""
    record = beside(output, ".job")
    if not record.exists() or shutil.which("squeue") is None:
        return None
    number = record.read_text().strip()
    found = subprocess.run(["squeue", "--noheader", "--jobs", number], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
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
        "signal": f"TERM@{60 * cluster.save_minutes}" if _is_warned(job, cluster) else None,
        "account": cluster.account,
        "partition": cluster.partition,
        "output": str(log).replace("%", "%%"),
        "open-mode": "append",
        "export": "ALL",
    }
    found = [f"--{key}={shlex.quote(str(value))}" for key, value in wanted.items() if value is not None]
    return [f"#SBATCH {word}" for word in [*found, "--requeue", *map(shlex.quote, cluster.sbatch)]]


def _is_warned(job: Job, cluster: ClusterConfig) -> bool:
    """Whether Slurm tells the job to stop before its limit."""
    return job.hours is not None and job.hours * 60 > 2 * cluster.save_minutes


def _tasks(job: Job, cluster: ClusterConfig) -> int:
    """Tasks of srun on each node."""
    return job.ranks_per_node if cluster.starter == "srun" else 1


def _cores(job: Job, cluster: ClusterConfig) -> int | None:
    """Cores of each task."""
    return max(1, cluster.cpus_per_node // _tasks(job, cluster)) if cluster.cpus_per_node else None


def setup_lines(cluster: ClusterConfig) -> list[str]:
    """Shell lines before the job: the cluster's own, the virtual environment, and that the variables which are passed on are there."""
    activation = [f"source {shlex.quote(str(cluster.venv / 'bin/activate'))}"] if cluster.venv else []
    return [
        *cluster.setup.splitlines(),
        *activation,
        *(f': "${{{name}:?is not set; export it where the job is submitted}}"' for name in cluster.pass_env),
    ]


def job_variables(cluster: ClusterConfig) -> dict[str, str]:
    """The variables that a cluster file asks for."""
    found = dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), cluster.network_interface) if cluster.network_interface else {}
    if cluster.timeout_minutes:
        found[TIMEOUT_MINUTES] = str(cluster.timeout_minutes)
    return {**found, **cluster.env}


def _exports(job: Job, cluster: ClusterConfig, output: Path) -> list[str]:
    ours = {ERROR_FILE: str(beside(output, ".error")), STOPPED_FILE: str(beside(output, ".stopped"))}
    ours |= {SAVE_SECONDS: str(60 * cluster.save_minutes)} if _is_warned(job, cluster) else {}
    if cluster.starter != "srun":
        ours |= torchrun_variables(max(30, 60 * cluster.save_minutes - 30))
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
