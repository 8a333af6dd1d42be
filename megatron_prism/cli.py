"""The `prism` command: finds the stage, checks its recipe, runs it. Nothing here imports torch. `prism launch` is launch/commands.py's.

    prism <stage> RECIPE.toml [key.sub=value ...] [--dry-run]
    prism convert import HF_DIR OUT      prism convert export CHECKPOINT OUT
    prism plan RECIPE|MODEL              prism run PIPELINE.toml              prism doctor
    prism launch local|slurm|nemo RECIPE|PIPELINE.toml
    prism inspect OUTPUT|BLEND.toml      prism report RUN [RUN ...]      prism status RUN [RUN ...]
    prism verify CHECKPOINT|RUN [...]
    prism stage my.module RECIPE.toml    (a stage of your own)

Bad input prints one message and exits with status 2. Under torchrun, what every rank would say is said by rank 0. A run that was told to stop, and
has saved, exits with status 75: the same command goes on.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_prism import __version__, stages
from megatron_prism.artifact import write_atomic
from megatron_prism.config import blocks_in, load_recipe, validate
from megatron_prism.errors import (
    ERROR_FILE,
    NEVER_AGAIN,
    STOPPED_EARLY,
    STOPPED_FILE,
    DivergenceError,
    MachineError,
    PassingDivergenceError,
    StoppedEarly,
    UserError,
)
from megatron_prism.launch import commands

SECONDS_FOR_RANK_0 = 5.0

app = typer.Typer(
    help="Carry an open base model from pre-training to RL: data, conversion, mid-training, RL, evaluation, analysis of what changed.",
    epilog="A recipe's keys: prism train --keys. What a recipe would do: prism train RECIPE.toml --dry-run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
convert = typer.Typer(help=stages.STAGES["convert"], no_args_is_help=True)
app.add_typer(convert, name="convert")
app.add_typer(commands.app, name="launch")

Words = Annotated[list[str] | None, typer.Argument(metavar="[RECIPE.toml] [key.sub=value ...]", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the plan; write nothing")]
Keys = Annotated[bool, typer.Option("--keys", help="list every key of the recipe, its default and its meaning")]


def main() -> None:
    """Entry point of `prism`, `python -m megatron_prism` and `torchrun -m megatron_prism`."""
    _yield_names_of_the_clone()
    try:
        app(_with_recipe_command(sys.argv[1:]), prog_name="prism", standalone_mode=True)
    except MachineError as error:
        _report(str(error), is_final=False)
        raise SystemExit(1) from None
    except UserError as error:
        _report(str(error))
        raise SystemExit(2) from None
    except DivergenceError as error:
        passes = isinstance(error, PassingDivergenceError)
        _report(str(error), is_final=not passes, is_certain=not passes)
        raise SystemExit(1) from None
    except StoppedEarly as stopped:
        if STOPPED_FILE in os.environ:
            write_atomic(Path(os.environ[STOPPED_FILE]), f"{stopped}\n")
        raise SystemExit(_status_of_a_stop()) from None


def _status_of_a_stop() -> int:
    """75; but 0 under a launcher that would take it for a failure, and start again at once what was told to stop."""
    return 0 if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) else STOPPED_EARLY


def _yield_names_of_the_clone() -> None:
    """A clone on PYTHONPATH also offers its folder `kernels` under the name of a PyPI package that transformers imports: let that one win."""
    root = Path(__file__).resolve().parent.parent
    ours = [entry for entry in sys.path if entry and Path(entry).resolve() == root]
    sys.path[:] = [entry for entry in sys.path if entry not in ours] + ours


def _report(message: str, is_final: bool = True, is_certain: bool = False) -> None:
    """Print an error once for all ranks: the others wait, and are ended by torchrun, if rank 0 failed too; an error of their own they print.

    is_final: whoever started us is told that starting again leads to the same; is_certain: also where earlier sessions went well.
    """
    error_file = os.environ.get(ERROR_FILE)
    if os.environ.get("RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(SECONDS_FOR_RANK_0)
        message = f"rank {os.environ['RANK']}: {message}"
    if error_file and is_final:
        if is_certain:
            Path(error_file + NEVER_AGAIN).touch()
        write_atomic(Path(error_file), message)
    typer.secho(f"error: {message}", fg="red", err=True)


def _with_recipe_command(arguments: list[str]) -> list[str]:
    """`prism convert RECIPE.toml` is `prism convert recipe RECIPE.toml`: the stage's own form beside import and export."""
    if arguments[:1] == ["convert"] and len(arguments) > 1 and (arguments[1].endswith(".toml") or "=" in arguments[1]):
        return ["convert", "recipe", *arguments[1:]]
    return arguments


def _run_stage(name: str, words: list[str] | None, dry_run: bool, keys: bool) -> None:
    stage = stages.load(name)
    if keys:
        _print_keys(stage.Config)
        return
    if not words:
        raise UserError(f"prism {name} needs a recipe: prism {name} RECIPE.toml [key.sub=value ...]; its keys: prism {name} --keys")
    recipes = [word for word in words if "=" not in word]
    if len(recipes) > 1:
        raise UserError(f"prism {name} takes one recipe, got {', '.join(recipes)}; an override reads key=value, without spaces")
    recipe = Path(recipes[0]) if recipes else None
    _dispatch(stage, load_recipe(recipe, [word for word in words if "=" in word], stage.Config), dry_run)


def _dispatch(stage: stages.Stage, config: Any, dry_run: bool) -> None:
    if dry_run:
        stage.dry_run(config)
    else:
        stage.run(config)


def _recipe_command(name: str) -> None:
    """`prism NAME RECIPE.toml`: what every stage but convert, report and analyze, which have commands of their own, looks like."""

    @app.command(name, help=stages.STAGES[name])
    def command(words: Words = None, dry_run: DryRun = False, keys: Keys = False) -> None:
        _run_stage(name, words, dry_run, keys)


for _name in stages.STAGES:
    if _name not in ("convert", "report", "analyze"):
        _recipe_command(_name)


@app.command(help=stages.STAGES["analyze"])
def analyze(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="RECIPE.toml | MODEL MODEL [MODEL ...] [key.sub=value ...]", show_default=False)
    ] = None,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="folder to write; default, of bare models: runs/analyze-NAME-NAME")] = None,
    dry_run: DryRun = False,
    keys: Keys = False,
) -> None:
    from megatron_prism.stages.analyze import with_models

    _run_stage("analyze", with_models(words or [], output), dry_run, keys)


@app.command("stage", hidden=True)
def own_stage(module: Annotated[str, typer.Argument(metavar="MODULE")], words: Words = None, dry_run: DryRun = False, keys: Keys = False) -> None:
    """Run a stage of your own: a module with Config, run, dry_run and parents."""
    _run_stage(module, words, dry_run, keys)


@convert.command("recipe", hidden=True)
def convert_recipe(words: Words = None, dry_run: DryRun = False, keys: Keys = False) -> None:
    _run_stage("convert", words, dry_run, keys)


@convert.command("import")
def convert_import(
    source: Annotated[Path, typer.Argument(metavar="HF_DIR", help="Hugging Face folder, .gguf file, or Megatron-LM torch_dist checkpoint")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="checkpoint folder to write")],
    tp: Annotated[int, typer.Option(help="cut the stored tensors for this tensor-parallel size (any other size can load them)")] = 1,
    pp: Annotated[int, typer.Option(help="write the layers in this many files")] = 1,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as in the source")] = None,
    like: Annotated[Path | None, typer.Option(help="Hugging Face folder with config and tokenizer, where the source has none")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="compare fp32 logits with transformers")] = False,
    dry_run: DryRun = False,
) -> None:
    """Hugging Face model -> checkpoint."""
    options = {"direction": "import", "source": source, "output": output, "tp": tp, "pp": pp, "dtype": dtype, "like": like, "verify": verify}
    _convert(options, dry_run)


@convert.command("export")
def convert_export(
    source: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="checkpoint folder, of any parallel layout, or a finished training run")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Hugging Face folder to write")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as the original model was stored")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="compare fp32 logits with transformers")] = False,
    dry_run: DryRun = False,
) -> None:
    """Checkpoint -> Hugging Face model."""
    _convert({"direction": "export", "source": source, "output": output, "dtype": dtype, "verify": verify}, dry_run)


def _convert(options: dict[str, Any], dry_run: bool) -> None:
    stage = stages.load("convert")
    given = {key: str(value) if isinstance(value, Path) else value for key, value in options.items() if value is not None}
    _dispatch(stage, validate(given, stage.Config, where="prism convert"), dry_run)


@app.command()
def run(
    pipeline: Annotated[Path, typer.Argument(metavar="PIPELINE.toml")],
    dry_run: DryRun = False,
    remake: Annotated[bool, typer.Option("--remake", help="remove outputs that are out of date and make them again")] = False,
    restarts: Annotated[int, typer.Option(min=0, help="how often a stage on many ranks that failed is started again from one checkpoint")] = 0,
) -> None:
    """Run a chain of stages, skipping what is done.

    A stage whose output is complete and unchanged is skipped; the first failure stops the chain and says where to look.
    """
    from megatron_prism.launch.pipeline import run_pipeline

    run_pipeline(pipeline, dry_run=dry_run, remake=remake, restarts=restarts)


@app.command()
def plan(
    target: Annotated[
        str, typer.Argument(metavar="RECIPE|PIPELINE|MODEL", help="training recipe, pipeline.toml, published name, or folder with a config.json")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key.sub=value ...]", show_default=False)] = None,
    model: Annotated[str | None, typer.Option(help="of a recipe: take the shape of this model (its checkpoint need not exist yet)")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs to lay the model out on")] = None,
    memory: Annotated[float | None, typer.Option(min=1, help="GiB of one GPU: say what fits")] = None,
    seq_len: Annotated[int | None, typer.Option(min=1, help="tokens per sequence; default: the recipe's, or 8192")] = None,
    gpu: Annotated[str | None, typer.Option(help="h200, h100; default: h100 with less than 100 GiB, else h200; others need --tflops")] = None,
    tflops: Annotated[float | None, typer.Option(min=1, help="bf16 rate of this GPU's matrix products, as `prism bench` measures it")] = None,
    network_gbps: Annotated[float, typer.Option(min=1, help="gigabits a second of each GPU between nodes")] = 400.0,
    price: Annotated[float | None, typer.Option("--price-per-gpu-hour", min=0, help="say what the run costs")] = None,
    tokens: Annotated[float | None, typer.Option(min=1, help="tokens of the run, such as 27e9; default: the recipe's")] = None,
    everything: Annotated[bool, typer.Option("--all", help="every layout, and why it is not taken")] = False,
) -> None:
    """What a model, a recipe or a pipeline costs: bytes, time and money; which layouts fit, and why not the others."""
    from megatron_prism.stages import plan as planner

    count = None if tokens is None else int(tokens)
    options = planner.Options(model, gpus, memory, seq_len, gpu, tflops, network_gbps, price, count, everything)
    planner.run(target, overrides or [], options)


@app.command()
def inspect(
    target: Annotated[Path, typer.Argument(metavar="OUTPUT|BLEND.toml", help="output of prism prep or prism adopt, or a blend")],
    page: Annotated[Path, typer.Option(metavar="FILE", help="the HTML file to write")] = Path("inspect.html"),
    seq_len: Annotated[int, typer.Option(min=1, help="tokens of a buffer, for how full packed ones are")] = 8192,
    tokens: Annotated[float | None, typer.Option(help="tokens of the run that epochs are counted for, such as 27e9")] = None,
    samples: Annotated[int, typer.Option(min=0, max=100, help="documents shown of each source")] = 3,
) -> None:
    """What is in prepared data, as one HTML page: shares, lengths, packing, what was removed, a few documents token by token."""
    from megatron_prism.stages import inspect as inspector

    inspector.run(target, page, seq_len, tokens, samples)


@app.command()
def verify(
    targets: Annotated[list[Path], typer.Argument(metavar="CHECKPOINT|RUN|OUTPUT [...]", help="checkpoints, runs, or outputs of stages")],
) -> None:
    """Whether checkpoints and other outputs are still what was written, by their checksums."""
    from megatron_prism.stages import verify as verifier

    verifier.run(targets)


@app.command(help=stages.STAGES["report"])
def report(
    words: Annotated[list[str] | None, typer.Argument(metavar="RUN [RUN ...]", help="outputs of stages, folders of them; or a recipe")] = None,
    output: Annotated[Path, typer.Option(metavar="FILE.html|FOLDER", help="of bare paths: what to write")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="of bare paths: heading; default: the first path's name")] = None,
    paper: Annotated[str | None, typer.Option(metavar="MODEL", help="of bare paths: the paper's model whose rows stand beside")] = None,
    dry_run: DryRun = False,
    keys: Keys = False,
) -> None:
    if keys or not words or any("=" in word or word.endswith(".toml") for word in words):
        _run_stage("report", words, dry_run, keys)
        return
    from megatron_prism.stages import report as reporter

    reporter.write([Path(word) for word in words], output, title, paper, dry_run)


@app.command()
def doctor(
    path: Annotated[Path, typer.Option(metavar="DIR", help="folder that outputs go to: its disk and its semantics are tried")] = Path(),
    ranks: Annotated[int, typer.Option(help="processes of the all-reduce")] = 2,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda, as in a recipe")] = "auto",
    only: Annotated[list[str] | None, typer.Option(metavar="CHECK", help="this check alone; can be given several times")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
) -> None:
    """Whether this machine can carry a run: software, GPUs, disk, ranks, a training step; each finding with its fix.

    Status 1 if anything is red.
    """
    from megatron_prism.doctor import command

    raise typer.Exit(command.run(path, ranks, device, only or [], as_json))


@app.command()
def status(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN [RUN ...]", help="outputs of stages, or the folder that a pipeline writes to")],
    as_json: Annotated[bool, typer.Option("--json", help="print it as JSON")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="look again and again, until all is finished")] = False,
    every: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="with --watch: how often")] = 5.0,
) -> None:
    """How far outputs are, also while they are made: progress, losses, speed, goodput, the last checkpoint, alarms.

    Status 0: running or finished; 3: dead or failed; 4: stopped, to be started again.
    """
    from megatron_prism.status import command

    raise typer.Exit(command.show(runs, as_json, every if watch else None))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def _print_keys(schema: type[Any], prefix: str = "") -> None:
    for name, field in schema.model_fields.items():
        blocks = blocks_in(field.annotation)
        default = "required" if field.is_required() else f"default {_shown_default(field)}"
        typer.echo(f"{prefix + name:<34} {'block' if blocks else default:<24} {field.description or ''}".rstrip())
        for block in blocks:
            _print_keys(block, f"{prefix}{name}." if not _is_list(field.annotation) else f"{prefix}{name}.0.")


def _shown_default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    return "none" if value is None else str(value)


def _is_list(annotation: Any) -> bool:
    origin = getattr(annotation, "__origin__", None)
    return origin in (list, tuple) or any(_is_list(part) for part in getattr(annotation, "__args__", ()))


if __name__ == "__main__":
    main()
