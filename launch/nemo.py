"""A job as a nemo-run experiment: for those whose cluster is described by nemo-run executors already (Slurm through SSH, Kubernetes, ...).

nemo-run is imported only here and only when asked for: pip install "megatron-prism[launch]", best into an environment of its own.
The task is our own torchrun command, so that a job is the same work here, under `prism run` and in an sbatch script; the executor brings the
machine. Refuses: several nodes without a rendezvous, which is the executor's to give (its torchrun launcher): use `task` with `launcher=True`.
"""

from typing import Any

from megatron_prism.errors import UserError
from megatron_prism.launch.job import Job, environment, prism_arguments, torchrun_argv


def run_experiment(job: Job, name: str, executor: Any = None, detach: bool = False) -> bool:
    """Run an experiment of this one job; True when it succeeded. executor: a nemo-run executor; None is this machine.

    detach: return once it is submitted (True then). A larger experiment is made by hand from `task`s.
    Errors: UserError where nemo-run is not installed.
    """
    run = _nemo_run()
    local = executor is None or isinstance(executor, run.LocalExecutor)
    name = name.replace(" ", "-")
    with run.Experiment(name) as experiment:
        experiment.add(task(job, launcher=not local), executor=executor or run.LocalExecutor(), name=name)
        experiment.run(tail_logs=not detach, detach=detach)
    # Leaving the block is what waits for the job.
    return detach or all(status["status"].name == "SUCCEEDED" for status in experiment.status(return_dict=True).values())


def task(job: Job, launcher: bool = False) -> Any:
    """The nemo-run task. launcher: the executor's own launcher ("torchrun") starts the ranks; otherwise the task is torchrun itself, on one node.

    Errors: UserError for several nodes without a launcher, and where nemo-run is not installed.
    """
    if launcher:
        return _nemo_run().Script(path="megatron_prism", entrypoint="python", m=True, args=prism_arguments(job), env=dict(job.env))
    if job.nodes > 1:
        raise UserError(f"nodes={job.nodes}: nemo-run must start the ranks of several nodes; give the executor launcher='torchrun'")
    python, *arguments = torchrun_argv(job)
    _, module, *words = arguments
    return _nemo_run().Script(path=module, entrypoint=python, m=True, args=words, env=environment(job, base={}))


def _nemo_run() -> Any:
    try:
        import nemo_run
    except ModuleNotFoundError as error:
        raise UserError(f"nemo-run cannot be imported ({error}); pip install 'megatron-prism[launch]'") from None
    return nemo_run
