"""The recipe of a comparison of models by how they answer, and what can be said of it without reading a response. No torch.

Owns: which stored responses belong to which model, which tasks and pairs are looked at. Refuses: an evaluation that is not finished, models and tasks
that it does not hold, models without a task in common, rows that the paper's table does not have.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field, model_validator

from megatron_prism import artifact
from megatron_prism.analysis.recipe import Name
from megatron_prism.config import Block, NonNegative, Positive
from megatron_prism.errors import UserError
from megatron_prism.evals.reference import load_table
from megatron_prism.evals.responses import ResponseFolder

PAPER_TABLE = "T15"
RESPONSES = "responses"
SUFFIX = ".jsonl.zst"
RESPONSES_OF_SCHEMA_1 = "generations"
"""folder in which evaluations of the first schema kept what models wrote"""


class AnsweringModel(Block):
    """One model, by its stored responses."""

    name: Name
    """what tables and pictures call it"""
    evaluation: Path
    """output of `prism evaluate` that holds its responses"""
    entry: Name | None = None
    """its name in that evaluation; none: `name`"""
    paper: str | None = None
    """the row of the paper's Table 15 that this model repeats, whose figures stand beside those of `paper_task`: granite-3.3-8b/mcs"""

    @property
    def stored_as(self) -> str:
        """Its name in the evaluation."""
        return self.entry or self.name


class Change(Block):
    """From a model to a model."""

    start: Name
    """name of the model before"""
    end: Name
    """name of the model after"""


class CourseConfig(Block):
    """What became of the prompts that were hardly solved or not at all, through a run of RL."""

    run: Path
    """output of `prism rl`; its kept samples are read"""
    prompts: Path
    """output of `prism prompts` with a solvability block, whose counts say how often each prompt was solved before"""
    at_most: NonNegative = 1
    """curves for prompts of which 0, 1, ... so many samples were right"""
    window: Positive = 1
    """kept steps that one point of a curve holds; a step has few such prompts"""


class Config(Block):
    """A comparison of how models answer."""

    models: Annotated[list[AnsweringModel], Field(min_length=1)]
    """the models, in the order in which they came to be"""
    pairs: list[Change] = Field(default_factory=list)
    """changes to measure; none given: each model against the one before it and against the first"""
    tasks: list[str] = Field(default_factory=list)
    """tasks of the evaluations; none given: those that every model answered"""
    rl: CourseConfig | None = None
    """prompts through RL, by what the solvability filter had found for them"""
    output: Path
    """folder to write"""
    least_responses: Positive = 20
    """the log-probability of correct (or of other) responses is "-" where there are fewer of them"""
    resamples: Annotated[int, Field(ge=100)] = 10_000
    """of the bootstrap over questions"""
    seed: NonNegative = 0
    """of the bootstrap"""
    paper_task: str = "math500"
    """the task that the paper's Table 15, 200 problems of MATH500, stands beside"""

    @model_validator(mode="after")
    def _names_are_known(self) -> "Config":
        names = [model.name for model in self.models]
        twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
        if twice is not None:
            raise ValueError(f"models.name={twice} is given twice; give each model a name of its own")
        unknown = next((name for pair in self.pairs for name in (pair.start, pair.end) if name not in names), None)
        if unknown is not None:
            raise ValueError(f"{unknown} is no model; models are {', '.join(names)}")
        same = next((pair for pair in self.pairs if pair.start == pair.end), None)
        if same is not None:
            raise ValueError(f"pairs: from {same.start} to {same.end} is no change; give two models")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks={self.tasks} names a task twice; name each once")
        return self


class Plan(NamedTuple):
    """A checked recipe. pairs: places of models."""

    tasks: list[str]
    pairs: list[tuple[int, int]]

    def folder(self, model: AnsweringModel, task: str) -> ResponseFolder:
        """Where a model's responses to a task lie."""
        return ResponseFolder(model.evaluation, model.stored_as, task)


def check(cfg: Config) -> Plan:
    """Everything that can be said without reading responses. Errors: UserError."""
    for path in evaluations(cfg):
        artifact.require(path, "evaluate")
    answered = [_answered(model) for model in cfg.models]
    tasks = cfg.tasks or [task for task in answered[0] if all(task in found for found in answered)]
    for model, found in zip(cfg.models, answered, strict=True):
        absent = next((task for task in tasks if task not in found), None)
        if absent is not None:
            path = ResponseFolder(model.evaluation, model.stored_as, absent).finished
            raise UserError(f"tasks: {absent} was not answered by model {model.name}: there is no {path}; its tasks are {', '.join(found)}")
    if not tasks:
        listed = "; ".join(f"{model.name}: {', '.join(found)}" for model, found in zip(cfg.models, answered, strict=True))
        raise UserError(f"models must have answered a task in common, and they have none ({listed}); evaluate them on the same tasks")
    _check_paper(cfg, tasks)
    return Plan(tasks, _pairs(cfg))


def evaluations(cfg: Config) -> list[Path]:
    """The evaluations that are read, each once."""
    return list(dict.fromkeys(model.evaluation for model in cfg.models))


def _answered(model: AnsweringModel) -> list[str]:
    """The tasks that a model answered, in the alphabet's order."""
    root = model.evaluation / RESPONSES
    found = sorted(path.name.removesuffix(SUFFIX) for path in (root / model.stored_as).glob(f"*{SUFFIX}"))
    if not found:
        raise UserError(f"{model.evaluation} holds no responses of a model {model.stored_as!r} (models.name={model.name}); {_held(model.evaluation)}")
    return found


def _held(evaluation: Path) -> str:
    """What an evaluation holds in place of the responses that are asked for, and what to do."""
    known = sorted(path.name for path in (evaluation / RESPONSES).glob("*") if path.is_dir())
    if known:
        return f"it has those of {', '.join(known)}: set models.entry"
    if (evaluation / RESPONSES_OF_SCHEMA_1).is_dir():
        return (
            f"its {RESPONSES_OF_SCHEMA_1}/ was written by an earlier version, in a form that is not read any more: evaluate the model again, into "
            "another output"
        )
    return "it asked no tasks: evaluate with a tasks block"


def _pairs(cfg: Config) -> list[tuple[int, int]]:
    names = [model.name for model in cfg.models]
    if cfg.pairs:
        return [(names.index(pair.start), names.index(pair.end)) for pair in cfg.pairs]
    ends = range(1, len(names))
    return list(dict.fromkeys([*((end - 1, end) for end in ends), *((0, end) for end in ends)]))


def _check_paper(cfg: Config, tasks: Sequence[str]) -> None:
    rows, asked = load_table(PAPER_TABLE).rows, [model for model in cfg.models if model.paper is not None]
    for model in asked:
        if model.paper not in rows:
            raise UserError(f"models.paper={model.paper} is no row of the paper's {PAPER_TABLE}; rows are {', '.join(rows)}")
    if asked and cfg.paper_task not in tasks:
        raise UserError(
            f"models.paper asks for the paper's {PAPER_TABLE}, which is about MATH500, and paper_task={cfg.paper_task} is none of the tasks "
            f"({', '.join(tasks)}); say with paper_task which of them it stands beside"
        )
