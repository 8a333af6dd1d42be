"""Report: what the stages of a pipeline left on disk -> one HTML page. Reads their files; runs no model and imports no torch.

    prism report RUN [RUN ...] [--output FILE.html|FOLDER]      outputs of stages, or the folder of a pipeline
    OUTPUT/report.html                                          as a stage of a pipeline

Owns: the recipe, and where the page is written. Refuses: a path without an artifact; to write over what is no report.
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from megatron_prism import artifact
from megatron_prism.config import Block
from megatron_prism.errors import UserError

KIND = "report"
PAGE = "report.html"


class Config(Block):
    """A report."""

    runs: Annotated[list[Path], Field(min_length=1)]
    """outputs of stages, or folders that hold some, such as the one a pipeline writes to; what they were made from is found by itself"""
    output: Path
    """folder to write"""
    title: str | None = None
    """heading of the page; none: the name of the first run"""
    paper: str | None = None
    """model of the paper whose rows stand beside, such as granite-3.3-8b; none: told from the shape of the models"""

    @field_validator("output")
    @classmethod
    def _is_folder(cls, output: Path) -> Path:
        if output.suffix == ".html":
            raise ValueError(
                f"{output} must be a folder here: a stage writes an output folder; a single file is made by prism report RUN --output {output}"
            )
        return output


def parents(cfg: Config) -> list[Path]:
    """The finished artifacts among the runs."""
    from megatron_prism.report import runs

    return [folder for path in cfg.runs for folder in runs.under(path) if runs.read(folder).state == "finished"]


def dry_run(cfg: Config) -> None:
    """Print what would be drawn."""
    _list(cfg.runs)


def _list(paths: list[Path]) -> None:
    from megatron_prism.report import lineage, runs

    for one in runs.gather(paths):
        print(f"{one.name}: {one.stage or 'artifact'}, {lineage.state_in_words(one)}" + (f" ({one.problem})" if one.problem else ""))


def run(cfg: Config) -> Path:
    """Draw; returns the finished output folder. A report of finished artifacts that are all as they were is not drawn again."""
    from megatron_prism.report import runs

    every = runs.gather(cfg.runs)
    if all(one.state == "finished" for one in every) and artifact.is_current(cfg.output, cfg, parents(cfg)):
        return artifact.left_as_it_is(cfg.output)
    content = _draw(cfg.runs, cfg.title, cfg.paper)
    artifact.begin(cfg.output, KIND, cfg, parents(cfg))
    artifact.write_atomic(cfg.output / PAGE, content)
    artifact.complete(cfg.output)
    _say(cfg.output / PAGE, len(every))
    return cfg.output


def write(paths: list[Path], output: Path, title: str | None = None, paper: str | None = None, dry: bool = False) -> Path:
    """The page of bare paths: into a file, or where output is not named .html into a folder. Errors: UserError for what is no report."""
    if dry:
        _list(paths)
        return output
    if output.suffix != ".html":
        return run(Config(runs=paths, output=output, title=title, paper=paper))
    from megatron_prism.report.page import GENERATOR

    if output.exists() and not (output.is_file() and GENERATOR in output.read_text(encoding="utf-8", errors="replace")[:4096]):
        raise UserError(f"{output} exists and is no page of prism report; choose another --output, or remove it")
    content = _draw(paths, title, paper)
    artifact.write_atomic(output, content)
    _say(output)
    return output


def _draw(paths: list[Path], title: str | None, paper: str | None) -> str:
    from megatron_prism.report import runs
    from megatron_prism.report.page import page

    return page(runs.gather(paths), title or paths[0].resolve().name, paper)


def _say(page: Path, count: int | None = None) -> None:
    print(f"{page}: {page.stat().st_size / 1024:,.0f} KiB" + (f", {count} artifacts" if count else ""))
