"""Jobs as a nemo-run experiment: for those whose machines nemo-run reaches already (Slurm through ssh, clouds and Kubernetes through SkyPilot).

nemo-run is imported only here and only when asked for: pip install "megatron-prism[launch]", into an environment of its own (its torchx wants an
older urllib3 than what we are proved with); `python` of the cluster file is then the interpreter that has torch. The task is our own command: on this
machine torchrun, elsewhere what the executor's torchrun launcher starts. Owns: what an executor is told. Refuses: what nemo-run would take silently
for something else (no account, a limit of ten minutes, several nodes on this machine, secrets where nothing hands them over).
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_prism.errors import UserError
from megatron_prism.launch.cluster import ClusterConfig
from megatron_prism.launch.job import Job, environment, process_argv, torchrun_argv
from megatron_prism.launch.plan import Step
from megatron_prism.launch.slurm import clock, job_variables, setup_lines

CLASSES = {"local": "LocalExecutor", "slurm": "SlurmExecutor", "skypilot": "SkypilotExecutor"}


def run_experiment(name: str, steps: Sequence[Step], place: ClusterConfig, detach: bool = False) -> bool:
    """Run the steps as one experiment, each after those it needs; True when all succeeded. detach: return once it is submitted (True then).

    Errors: UserError where nemo-run is not installed, and as for `executor_settings`.
    """
    run = _nemo_run()
    here = place.nemo.executor == "local"  # one after another there
    ids: dict[str, str] = {}
    with run.Experiment(name.replace(" ", "-")) as experiment:
        for step in steps:
            before = [] if here else [ids[needed] for needed in step.after if needed in ids]
            ids[step.name] = experiment.add(task(step.job, place), executor=executor(step.job, place), name=step.name, dependencies=before)
        experiment.run(sequential=here, tail_logs=not detach, detach=detach)
    # Leaving the block is what waits for the jobs.
    return detach or all(status["status"].name == "SUCCEEDED" for status in experiment.status(return_dict=True).values())


def described(step: Step, place: ClusterConfig) -> str:
    """What `prism launch nemo --print` shows of a step: the executor's settings and the command."""
    kind, settings = executor_settings(step.job, place)
    lines = [f"# ----- {step.name}" + (f", after {', '.join(step.after)}" if step.after else ""), kind]
    lines += [f"  {key} = {json.dumps(value)}" for key, value in settings.items()]
    return "\n".join([*lines, f"  task = {shlex.join(_words(step.job, place))}"])


def task(job: Job, place: ClusterConfig) -> Any:
    """The nemo-run task of a job."""
    python, _, module, *words = _words(job, place)
    return _nemo_run().Script(path=module, entrypoint=python, m=True, args=words, env=dict(job.env))


def executor(job: Job, place: ClusterConfig) -> Any:
    """The nemo-run executor of a job."""
    run = _nemo_run()
    kind, settings = executor_settings(job, place)
    given: dict[str, Any] = {**settings, "packager": run.Packager()}  # nothing is packed: the code is installed where it runs
    if kind == "SlurmExecutor":
        tunnel = given.pop("tunnel")
        given["tunnel"] = run.SSHTunnel(**tunnel) if tunnel["host"] else run.LocalTunnel(job_dir=tunnel["job_dir"])
    return getattr(run, kind)(**given)


def executor_settings(job: Job, place: ClusterConfig) -> tuple[str, dict[str, Any]]:
    """The class of nemo-run's executor and its arguments, as plain values. Errors: UserError, see the module."""
    kind = place.nemo.executor
    variables = {**environment(job, base=job_variables(place), cores=place.cpus_per_node or job.ranks_per_node)}
    settings = {"local": _local, "slurm": _slurm, "skypilot": _skypilot}[kind](job, place, variables)
    return CLASSES[kind], {key: value for key, value in settings.items() if value is not None}


def _words(job: Job, place: ClusterConfig) -> list[str]:
    """The command of a task: elsewhere, and on several ranks, the launcher brings its own torchrun."""
    return torchrun_argv(job, python=place.python) if place.nemo.executor == "local" and job.ranks > 1 else process_argv(job, place.python)


def _local(job: Job, place: ClusterConfig, variables: Mapping[str, str]) -> dict[str, Any]:
    if job.nodes > 1:
        raise UserError(f"nodes={job.nodes}: nemo-run's local executor has this machine alone; set nemo.executor to slurm or skypilot")
    return {"env_vars": dict(variables)}


def _slurm(job: Job, place: ClusterConfig, variables: Mapping[str, str]) -> dict[str, Any]:
    if place.account is None:
        raise UserError("account is missing: nemo-run's Slurm executor wants one; set account in the cluster file, or --account")
    here = "--container-workdir" if place.container else "--chdir"
    return {
        "account": place.account,
        "partition": place.partition,
        "time": clock(_hours(job)),
        "nodes": job.nodes,
        "ntasks_per_node": job.ranks_per_node,
        "gpus_per_node": job.gpus_per_node,
        "launcher": "torchrun" if job.ranks > 1 else None,
        "container_image": place.container,
        "container_mounts": list(place.mounts),
        "srun_args": [f"{here}={Path.cwd()}", "--kill-on-bad-exit=1", *place.srun],
        "additional_parameters": {"requeue": True},
        "retries": place.requeues,
        "env_vars": dict(variables),
        "setup_lines": "\n".join([*setup_lines(place), *map(_required, place.pass_env)]) or None,
        "tunnel": {"host": place.nemo.host, "user": place.nemo.user, "job_dir": str(place.nemo.job_dir or "")},
    }


def _required(name: str) -> str:
    return f': "${{{name}:?is not set; export it where the job is submitted}}"'


def _skypilot(job: Job, place: ClusterConfig, variables: Mapping[str, str]) -> dict[str, Any]:
    if place.pass_env:
        raise UserError(f"pass_env={list(place.pass_env)}: nemo-run hands SkyPilot values alone, which would be written down; use SkyPilot's secrets")
    if job.gpus_per_node and place.nemo.accelerator is None:
        raise UserError('nemo.accelerator is missing: SkyPilot asks for GPUs by kind; set it, such as accelerator = "H200"')
    return {
        "infra": place.nemo.infra,
        "gpus": place.nemo.accelerator if job.gpus_per_node else None,
        "gpus_per_node": job.gpus_per_node,
        "num_nodes": job.nodes,
        "container_image": place.container,
        "launcher": "torchrun" if job.ranks > 1 else None,
        "retries": place.requeues,
        "env_vars": dict(variables),
        "setup": "\n".join(setup_lines(place)) or None,
    }


def _hours(job: Job) -> float:
    if job.hours is None:
        raise UserError("hours is missing: nemo-run's own limit is ten minutes; set hours, or --hours")
    return job.hours


def _nemo_run() -> Any:
    try:
        import nemo_run
    except ModuleNotFoundError as error:
        raise UserError(f"nemo-run cannot be imported ({error}); pip install 'megatron-prism[launch]'") from None
    return nemo_run
