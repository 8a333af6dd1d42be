"""The `prism` command: finds the stage, checks its recipe, runs it. Nothing here imports torch.

    prism <stage> RECIPE.toml [key.sub=value ...] [--dry-run]
    prism convert import HF_DIR OUT      prism convert export CHECKPOINT OUT
    prism run PIPELINE.toml              prism doctor

Bad input prints one message and exits with status 2. Under torchrun, what every rank would say is said by rank 0.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_prism import __version__, stages
from megatron_prism.config import load_recipe, validate
from megatron_prism.errors import UserError

app = typer.Typer(help="Mid-train, convert and evaluate open language models on megatron-core.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
convert = typer.Typer(help=stages.STAGES["convert"], no_args_is_help=True)
app.add_typer(convert, name="convert")

Words = Annotated[list[str] | None, typer.Argument(metavar="[RECIPE.toml] [key.sub=value ...]", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the plan; write nothing")]
Keys = Annotated[bool, typer.Option("--keys", help="list every key of the recipe, its default and its meaning")]


def main() -> None:
    """Entry point of `prism`, `python -m megatron_prism` and `torchrun -m megatron_prism`."""
    try:
        app(_with_recipe_command(sys.argv[1:]), prog_name="prism", standalone_mode=True)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0" or getattr(error, "rank_local", False):
            typer.secho(f"error: {error}", fg="red", err=True)
        raise SystemExit(2) from None


def _with_recipe_command(arguments: list[str]) -> list[str]:
    """`prism convert RECIPE.toml` is `prism convert recipe RECIPE.toml`: the stage's own form beside import and export."""
    if arguments[:1] == ["convert"] and len(arguments) > 1 and (arguments[1].endswith(".toml") or "=" in arguments[1]):
        return ["convert", "recipe", *arguments[1:]]
    return arguments


def _run_stage(name: str, words: list[str] | None, dry_run: bool, keys: bool) -> None:
    stage = stages.load(name)
    if keys:
        return _print_keys(stage.Config)
    if not words:
        raise UserError(f"prism {name} needs a recipe: prism {name} RECIPE.toml [key.sub=value ...]; its keys: prism {name} --keys")
    recipe = None if "=" in words[0] else Path(words[0])
    config = load_recipe(recipe, words if recipe is None else words[1:], stage.Config)
    _dispatch(stage, config, dry_run)


def _dispatch(stage: stages.Stage, config: Any, dry_run: bool) -> None:
    if dry_run:
        stage.dry_run(config)
    else:
        stage.run(config)


@app.command(help=stages.STAGES["prep"])
def prep(words: Words = None, dry_run: DryRun = False, keys: Keys = False) -> None:
    _run_stage("prep", words, dry_run, keys)


@app.command(help=stages.STAGES["train"])
def train(words: Words = None, dry_run: DryRun = False, keys: Keys = False) -> None:
    _run_stage("train", words, dry_run, keys)


@app.command(help=stages.STAGES["evaluate"])
def evaluate(words: Words = None, dry_run: DryRun = False, keys: Keys = False) -> None:
    _run_stage("evaluate", words, dry_run, keys)


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
) -> None:
    """Run a chain of stages; those whose output is complete and unchanged are skipped."""
    from megatron_prism.launch.pipeline import run_pipeline

    run_pipeline(pipeline, dry_run=dry_run)


@app.command()
def doctor() -> None:
    """What this machine has, which engine parts are active, and every patch that the CPU layer applies."""
    from megatron_prism.engine.device import report

    typer.echo(report())


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def _print_keys(schema: type[Any], prefix: str = "") -> None:
    from megatron_prism.config import _blocks_in

    for name, field in schema.model_fields.items():
        blocks = _blocks_in(field.annotation)
        default = "required" if field.is_required() else f"default {field.default!r}"
        typer.echo(f"{prefix}{name:<{max(1, 34 - len(prefix))}} {'block' if blocks else default:<24} {field.description or ''}")
        for block in blocks:
            _print_keys(block, f"{prefix}{name}.")


if __name__ == "__main__":
    main()
