"""The recipe of an analysis, and everything that can be said of it without reading a weight. No torch.

Owns: which models are compared with which, and which of the paper's figures stand beside. Refuses: models of another family, shape or tokenizer (the
first difference is named), names that are no model's, rows that the paper's table does not have.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from megatron_prism import families
from megatron_prism.config import Block, Positive
from megatron_prism.engine import run_folder
from megatron_prism.errors import UserError
from megatron_prism.evals.reference import load_table
from megatron_prism.families.compare import POSITIONS, model_difference, tokenizer_difference
from megatron_prism.families.family import Family
from megatron_prism.families.model_config import ModelConfig

Name = Annotated[str, Field(pattern=r"^[^/\s][^/]*$")]
PAPER_TABLE = "T12"


class AnalyzedModel(Block):
    """One model."""

    name: Name
    """what tables and pictures call it"""
    path: Path
    """checkpoint folder, training run (its newest complete checkpoint), or Hugging Face folder"""


class Pair(Block):
    """One update: from a model to a model."""

    start: Name
    """name of the model before"""
    end: Name
    """name of the model after"""
    paper: str | None = None
    """the row of the paper's Table 12 that this repeats, whose figures (and those of Tables 22 and 23) stand beside: granite-3.3-8b/mcs/base-mt"""


class Series(Block):
    """The checkpoints of a run, each against the model that it began with."""

    run: Path
    """training or RL run; its complete checkpoints are taken, oldest first"""
    start: Name | None = None
    """name of the model that it began with; none: the last of `models` that is not of the run itself"""
    every: Positive = 1
    """take each Nth checkpoint, and the last"""


class Config(Block):
    """An analysis of what changed in the weights."""

    models: Annotated[list[AnalyzedModel], Field(min_length=1)]
    """the models, in the order in which they came to be; all of one shape and with one tokenizer"""
    pairs: Annotated[list[Pair], Field(default_factory=list)]
    """updates to measure; none given: each model against the one before it and against the first"""
    series: Series | None = None
    """the course of a run, step by step"""
    output: Path
    """folder to write"""
    cosines: bool = True
    """the angle between every two of `pairs` that have one start; three tensors are in memory then instead of two"""
    rank: Literal["stable", "effective"] | None = "stable"
    """rank of each matrix's update in `pairs`: stable (Frobenius over spectral norm, squared), or effective (entropy of the singular values) as well,
    which needs every singular value and takes minutes for a large matrix; none: left out"""
    workers: Positive = 1
    """processes that share the matrices; each holds its own two or three tensors"""

    @model_validator(mode="after")
    def _names_are_known(self) -> "Config":
        names = [model.name for model in self.models]
        twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
        if twice is not None:
            raise ValueError(f"models.name={twice} is given twice; give each model a name of its own")
        asked = [name for pair in self.pairs for name in (pair.start, pair.end)]
        unknown = next((name for name in [*asked, self.series and self.series.start] if name and name not in names), None)
        if unknown is not None:
            raise ValueError(f"{unknown} is no model; models are {', '.join(names)}")
        same = next((pair for pair in self.pairs if pair.start == pair.end), None)
        if same is not None:
            raise ValueError(f"pairs: from {same.start} to {same.end} is no update; give two models")
        if len(names) == 1 and self.series is None:
            raise ValueError("models: one model has changed against nothing; give two or more, or a series")
        return self


class Compared(NamedTuple):
    """One update as it is measured. start, end: places in `Plan.models`; step: of a series."""

    label: str
    start: int
    end: int
    paper: str | None = None
    step: int | None = None


class Plan(NamedTuple):
    """A checked recipe."""

    family: Family
    shape: ModelConfig
    models: list[tuple[str, Path]]
    """name and folder; the checkpoints of a series come last"""
    pairs: list[Compared]
    """those of a series come last"""
    cosines: list[tuple[int, int]]
    """places in `pairs`"""


def check(cfg: Config) -> Plan:
    """Everything that can be said without reading weights. Errors: UserError."""
    models = [(model.name, run_folder.find_weights(model.path, "models.path")) for model in cfg.models]
    steps = _steps(cfg.series) if cfg.series is not None else []
    listed = _pairs(cfg)
    _check_paper(listed)
    plan = [*models, *((f"step {step}", folder) for step, folder in steps)]
    paths = [*(model.path for model in cfg.models), *([cfg.series.run] * len(steps) if cfg.series is not None else [])]
    for path, (name, folder) in zip(paths, plan, strict=True):
        run_folder.check_apart(cfg.output, path, folder)
        check_alike(plan[0], (name, folder))
    family, shape = families.load(run_folder.hf_files(models[0][1]))
    first = _start(cfg.series, models) if cfg.series is not None else 0
    course = [Compared(f"{models[first][0]} to step {step}", first, len(models) + place, None, step) for place, (step, _) in enumerate(steps)]
    angles = [(one, other) for other in range(len(listed)) for one in range(other) if listed[one].start == listed[other].start]
    return Plan(family, shape, plan, [*listed, *course], angles if cfg.cosines else [])


def check_alike(first: tuple[str, Path], other: tuple[str, Path]) -> None:
    """Errors: UserError for two named models of another shape or tokenizer; their positions may differ."""
    one, two = (run_folder.hf_files(folder) for _, folder in (first, other))
    difference = model_difference(families.load(one)[1], families.load(two)[1], POSITIONS)
    if difference is not None:
        raise UserError(f"models {first[0]} ({first[1]}) and {other[0]} ({other[1]}) cannot be compared: {difference}; give models of one shape")
    difference = tokenizer_difference(one, two)
    if difference is not None:
        raise UserError(
            f"models {first[0]} ({first[1]}) and {other[0]} ({other[1]}) have different tokenizers, so that rows of their embeddings stand for "
            f"different tokens: {difference}; give models that read text as the same ids"
        )


def _pairs(cfg: Config) -> list[Compared]:
    names = [model.name for model in cfg.models]
    given = [(names.index(pair.start), names.index(pair.end), pair.paper) for pair in cfg.pairs]
    if not given:
        ends = range(1, len(names))
        given = [(start, end, None) for start, end in dict.fromkeys([*((end - 1, end) for end in ends), *((0, end) for end in ends)])]
    return [Compared(f"{names[start]} to {names[end]}", start, end, paper) for start, end, paper in given]


def _steps(series: Series) -> list[tuple[int, Path]]:
    found = run_folder.complete_steps(series.run)
    if not found:
        raise UserError(f"series.run={series.run} holds no complete checkpoint (checkpoints/step_*); give a run that has saved one")
    chosen = dict.fromkeys([*found[series.every - 1 :: series.every], found[-1]])
    return [(int(folder.name.removeprefix("step_")), folder) for folder in chosen]


def _start(series: Series, models: Sequence[tuple[str, Path]]) -> int:
    """Place of the model that the run began with."""
    if series.start is not None:
        return [name for name, _ in models].index(series.start)
    others = [place for place, (_, folder) in enumerate(models) if not folder.resolve().is_relative_to(series.run.resolve())]
    if not others:
        raise UserError(f"series.run={series.run} is the run of every one of models; give series.start, the model that it began with")
    return others[-1]


def _check_paper(pairs: Sequence[Compared]) -> None:
    rows = load_table(PAPER_TABLE).rows
    for pair in pairs:
        if pair.paper is not None and pair.paper not in rows:
            raise UserError(f"pairs.paper={pair.paper} is no row of the paper's {PAPER_TABLE}; rows are {', '.join(rows)}")
