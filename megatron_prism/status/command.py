"""`prism status`: finds what each path is, asks, prints; once or again and again."""

import json
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from megatron_prism.errors import UserError
from megatron_prism.status import life, outputs, pipeline, run, text
from megatron_prism.status.said import SCHEMA_VERSION, Status, worst

CLEAR = "\x1b[2J\x1b[H"
READERS: dict[str, Callable[[Path, dict[str, Any], dict[str, Any], float], Status]] = {
    **dict.fromkeys(run.KINDS, run.status),
    "prep": outputs.prep,
    "evaluate": outputs.evaluation,
}


def show(paths: Sequence[Path], as_json: bool, every_seconds: float | None) -> int:
    """Print; returns the exit status. every_seconds: look again so often, until all is finished. Errors: UserError for what is no output."""
    while True:
        found = [look(path, life.now()) for path in paths]
        if as_json:
            typer.echo(json.dumps({"schema_version": SCHEMA_VERSION, "exit": worst(found), "outputs": [one.as_table() for one in found]}))
        else:
            typer.echo((CLEAR if every_seconds and sys.stdout.isatty() else "") + "\n".join(text.block(one) for one in found))
        if every_seconds is None or all(one.state == "finished" for one in found):
            return worst(found)
        sys.stdout.flush()
        time.sleep(every_seconds)


def look(path: Path, now: float) -> Status:
    """The status of a path. Errors: UserError that says what the path is instead."""
    if not path.exists():
        raise UserError(f"{path} does not exist; name the output of a stage, or the folder that a pipeline writes to")
    if not path.is_dir():
        raise UserError(f"{path} is a file; name the output of a stage (a folder with {life.PROVENANCE}), or the folder that a pipeline writes to")
    folder = path.resolve()
    if (folder / life.PROVENANCE).is_file():
        return one_output(folder, now)
    if (folder / pipeline.RECORD).is_file() or pipeline.stage_folders(folder):
        return pipeline.status(folder, one_output, now)
    raise UserError(
        f"{path} is {_what(folder)}; name the output of a stage (a folder with {life.PROVENANCE}), or the folder that a pipeline writes to"
    )


def one_output(folder: Path, now: float) -> Status:
    """The status of an output, however broken it is."""
    try:
        provenance = json.loads((folder / life.PROVENANCE).read_text(encoding="utf-8"))
        config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8")) if (folder / "config.toml").is_file() else {}
        return READERS.get(str(provenance["kind"]), outputs.other)(folder, provenance, config, now)
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        return Status(folder.name, folder, "", "unreadable", f"{type(error).__name__}: {error}")


def _what(folder: Path) -> str:
    """A folder that is no output, in words."""
    names = {path.name for path in folder.iterdir()}
    if not names:
        return "an empty folder"
    if "config.json" in names:
        return "a Hugging Face model, which no stage made"
    if any(name.startswith("step_") for name in names):
        return f"the folder of a run's checkpoints: the run is {folder.parent}"
    if any(name.endswith(".idx") for name in names):
        return "a folder of token shards that no stage made"
    return "no output of a stage, and holds none"
