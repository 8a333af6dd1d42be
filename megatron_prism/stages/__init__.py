"""The stages: one module each, with the same four names, so that the command line and the pipeline treat them alike.

Config          the schema of its recipe (a `config.Block` with an `output: Path`); importing the module never imports torch
run(cfg)        do it, return the finished output folder
dry_run(cfg)    print what `run` would do, without doing it
parents(cfg)    the finished artifacts it reads (their digests decide whether an old output is still current)
"""

import difflib
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from megatron_prism import artifact
from megatron_prism.config import validate
from megatron_prism.errors import UserError

STAGES = {
    "tokenizer": "text -> a tokenizer, for models trained from nothing",
    "prep": "text -> token shards and a blend",
    "adopt": "existing Megatron shards -> manifests and a blend",
    "convert": "Hugging Face model <-> megatron-core checkpoint",
    "train": "checkpoint (or random weights) + blend -> checkpoints",
    "merge": "several models of one shape -> one, their weighted mean",
    "extend": "checkpoint -> the same for longer sequences",
    "prompts": "prompt sets -> the prompts that a model can learn from",
    "rl": "checkpoint + prompts -> policy, by verifiable rewards",
    "evaluate": "model -> scores",
    "analyze": "models -> what changed between their weights",
    "cka": "models + texts -> how alike their representations are",
    "behaviour": "stored responses -> how models answer, and what changed",
    "report": "outputs of stages -> one page about all of them",
    "landscape": "three models -> scores of the merged ones between them",
    "bench": "model and layout -> what a training step costs",
}
"""Stage name -> the arrow of the flow that it is."""

PARALLEL_STAGES = frozenset({"train", "extend", "rl", "bench"})
"""Stages that run on many ranks, under torchrun."""

STAGES_FOR_RANKS = frozenset({"prep", "prompts", "evaluate", "cka", "landscape"})
"""Stages that run in one process, or under torchrun where ranks are asked for."""


class Stage(Protocol):
    """What every stage module offers."""

    Config: type[Any]
    run: Callable[[Any], Path]
    dry_run: Callable[[Any], None]
    parents: Callable[[Any], list[Path]]


def load(name: str) -> Stage:
    """The module of a stage. A dotted name is a module of your own that has the same four names (it must be importable: put it on PYTHONPATH).

    Errors: UserError for a name that is no stage, or a module without the four names.
    """
    if "." not in name and name not in STAGES:
        near = difflib.get_close_matches(name, STAGES, n=1)
        raise UserError(f"there is no stage {name!r}; " + (f"did you mean {near[0]}?" if near else f"stages are {', '.join(STAGES)}"))
    path = name if "." in name else f"megatron_prism.stages.{name}"
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise  # the stage is there; something that it needs is not
        raise UserError(f"stage {name}: there is no module {path} in this installation; install the version that has it, or set PYTHONPATH") from None
    missing = [part for part in ("Config", "run", "dry_run", "parents") if not hasattr(module, part)]
    if missing:
        raise UserError(f"stage {name}: {path} lacks {', '.join(missing)}; a stage module has Config, run, dry_run and parents")
    return cast(Stage, module)


def run_once(stage: Stage, asked: Any) -> Path:
    """The finished output of a stage, run unless this very recipe already made it from these very parents. asked: its Config, or the table of one."""
    cfg = validate(dict(asked), stage.Config, str(asked["output"])) if isinstance(asked, Mapping) else asked
    return artifact.left_as_it_is(Path(cfg.output)) if artifact.is_current(cfg.output, cfg, stage.parents(cfg)) else stage.run(cfg)
