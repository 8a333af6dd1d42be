"""The stages: one module each, with the same four names, so that the command line and the pipeline treat them alike.

    Config          the schema of its recipe (a `config.Block` with an `output: Path`); importing the module never imports torch
    run(cfg)        do it, return the finished output folder
    dry_run(cfg)    print what `run` would do, without doing it
    parents(cfg)    the finished artifacts it reads (their digests decide whether an old output is still current)
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast

STAGES = {
    "prep": "text -> token shards and a blend",
    "convert": "Hugging Face model <-> megatron-core checkpoint",
    "train": "checkpoint (or random weights) + blend -> checkpoints",
    "evaluate": "model -> scores",
}
"""Stage name -> the arrow of the flow that it is."""

PARALLEL_STAGES = frozenset({"train"})
"""Stages that run on many ranks, under torchrun."""


class Stage(Protocol):
    """What every stage module offers."""

    Config: type[Any]
    run: Callable[[Any], Path]
    dry_run: Callable[[Any], None]
    parents: Callable[[Any], list[Path]]


def load(name: str) -> Stage:
    """The module of a stage."""
    return cast(Stage, importlib.import_module(f"megatron_prism.stages.{name}"))
