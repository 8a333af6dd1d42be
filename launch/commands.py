"""`prism launch local|slurm|nemo`: the words of the command line. What they start is `launcher`'s, imported when a command runs."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Start a recipe or a pipeline: on this machine, as Slurm jobs, as a nemo-run experiment.", no_args_is_help=True)

Targets = Annotated[list[str], typer.Argument(metavar="RECIPE|PIPELINE.toml [key.sub=value ...]", show_default=False)]
StageOf = Annotated[str | None, typer.Option(help="whose recipe it is; default: what its name begins with, as in train_16k.toml")]
Nodes = Annotated[int | None, typer.Option(help="machines")]
Gpus = Annotated[int | None, typer.Option(help="GPUs of each machine; a training stage has one rank a GPU")]
Ranks = Annotated[int | None, typer.Option(help="processes in all, where there are no GPUs")]
Hours = Annotated[float | None, typer.Option(help="wall-clock limit; of a pipeline: the most that a stage asks for")]
ClusterFile = Annotated[Path | None, typer.Option(envvar="PRISM_CLUSTER", help="what the cluster wants to know; its keys: docs/launch.md")]
Account = Annotated[str | None, typer.Option(help="account to charge; wins over the cluster file")]
PartitionName = Annotated[str | None, typer.Option(help="partition to queue in; wins over the cluster file")]
Restarts = Annotated[int, typer.Option(min=0, help="how often what failed is started again from one and the same checkpoint")]
PrintOnly = Annotated[bool, typer.Option("--print", help="show what would be started; write nothing")]


@app.command("local")
def launch_local(
    words: Targets, stage: StageOf = None, gpus: Gpus = None, ranks: Ranks = None, restarts: Restarts = 0, print_only: PrintOnly = False
) -> None:
    """torchrun on this machine; a pipeline as prism run does it."""
    from megatron_prism.launch import launcher

    launcher.local(launcher.read(words, stage, gpus=gpus, ranks=ranks), print_only, restarts)


@app.command("slurm")
def launch_slurm(
    words: Targets,
    stage: StageOf = None,
    nodes: Nodes = None,
    gpus: Gpus = None,
    ranks: Ranks = None,
    hours: Hours = None,
    cluster: ClusterFile = None,
    account: Account = None,
    partition: PartitionName = None,
    after: Annotated[list[str] | None, typer.Option(help="number of a job to wait for")] = None,
    print_only: PrintOnly = False,
) -> None:
    """One sbatch script a stage; a pipeline as jobs that wait for each other, without those whose output is finished."""
    from megatron_prism.launch import launcher
    from megatron_prism.launch.cluster import load_cluster

    target = launcher.read(words, stage, nodes=nodes, gpus=gpus, ranks=ranks, hours=hours)
    launcher.on_slurm(target, load_cluster(cluster, account=account, partition=partition), after or [], print_only)


@app.command("nemo")
def launch_nemo(
    words: Targets,
    stage: StageOf = None,
    nodes: Nodes = None,
    gpus: Gpus = None,
    ranks: Ranks = None,
    hours: Hours = None,
    cluster: ClusterFile = None,
    account: Account = None,
    partition: PartitionName = None,
    detach: Annotated[bool, typer.Option("--detach", help="return once it is submitted")] = False,
    print_only: PrintOnly = False,
) -> None:
    """A nemo-run experiment, on the executor that the cluster file names: local, slurm, skypilot."""
    from megatron_prism.launch import launcher
    from megatron_prism.launch.cluster import load_cluster

    target = launcher.read(words, stage, nodes=nodes, gpus=gpus, ranks=ranks, hours=hours)
    launcher.on_nemo(target, load_cluster(cluster, account=account, partition=partition), detach, print_only)
