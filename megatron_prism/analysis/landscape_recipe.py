"""The recipe of a landscape, and everything that can be said of it without reading a weight. No torch.

Owns: which points are scored, by what. Refuses: models of another family, shape or tokenizer (the first difference is named), a landscape without
points or without scores, points towards an RL model that is not given, a scorer that cannot be imported.
"""

import hashlib
import importlib
import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from megatron_prism import families
from megatron_prism.analysis.landscape import ModelName, Place, grid, on_path, path_positions
from megatron_prism.analysis.recipe import check_alike
from megatron_prism.config import Block, Positive, PositiveFloat
from megatron_prism.engine import run_folder
from megatron_prism.errors import UserError
from megatron_prism.evals.recipe import EvaluateConfig, GenerationConfig, ModelEntry, PerplexityConfig, TasksConfig
from megatron_prism.families.compare import model_difference
from megatron_prism.families.family import Family
from megatron_prism.families.model_config import ModelConfig

Coordinate = Annotated[float, Field(ge=-100, le=100)]
Scorer = Callable[[Path], Mapping[str, float]]
FIFTHS = [0.0, 0.25, 0.5, 0.75, 1.0]


class PathConfig(Block):
    """Points on the straight lines from the base to the mid-trained model, and from there to the one after RL."""

    points: Annotated[int, Field(ge=2)] = 5
    """of each line, its ends among them"""
    at: Annotated[list[Coordinate], Field(min_length=1)] | None = None
    """positions in place of `points`: 0 is the base, 1 the mid-trained model, 2 the one after RL; less than 0 and more than 2 go on beyond them"""

    def positions(self, legs: int) -> list[float]:
        """In order, each once."""
        return path_positions(self.points, legs) if self.at is None else sorted(set(self.at))


class GridConfig(Block):
    """Every alpha with every beta; the paper's is 5 x 5 over 0 to 1."""

    alpha: Annotated[list[Coordinate], Field(min_length=2)] = FIFTHS
    """shares of the way from the base to the mid-trained model; negative ones and more than 1 go on beyond them"""
    beta: Annotated[list[Coordinate], Field(min_length=2)] = FIFTHS
    """shares of the update from the mid-trained model to the one after RL"""

    @model_validator(mode="after")
    def _ascends(self) -> "GridConfig":
        for axis, values in (("alpha", self.alpha), ("beta", self.beta)):
            if any(one >= other for one, other in pairwise(values)):
                raise ValueError(f"{axis}={values} must ascend; try {axis}={sorted(set(values))}")
        return self


class Config(Block):
    """Scores of merged models between a base, its mid-trained model and the one after RL."""

    base: Path
    """checkpoint folder, training run (its newest complete checkpoint), or Hugging Face folder"""
    midtrain: Path
    """the mid-trained model, in any of these forms"""
    rl: Path | None = None
    """the model after RL; none: the path ends at the mid-trained model"""
    output: Path
    """folder to write"""
    path: PathConfig | None = None
    """points on the path; an empty table takes the defaults"""
    grid: GridConfig | None = None
    """points on a grid; an empty table takes the paper's 5 x 5"""
    perplexity: PerplexityConfig | None = None
    """score: loss on the validation split of a blend"""
    tasks: TasksConfig | None = None
    """score: accuracy on tasks"""
    scorer: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")] | None = None
    """score: a function of your own by its dotted name, such as my_scores.rhymes (importable: put it on PYTHONPATH).
    It is called with the Hugging Face folder of each merged model, and returns {name: number}"""
    generation: GenerationConfig = GenerationConfig.model_validate({})
    """how answers are drawn, and by what"""
    like: ModelName = "midtrain"
    """the model whose config, tokenizer files and chat template every point takes"""
    point_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """type that merged weights are written in.
    Most of RL's update is smaller than the steps of bfloat16: in that type, what lies between two models is lost in rounding"""
    keep: bool = False
    """keep every merged model, in OUTPUT/models; without it one at a time is on disk"""
    threads: Positive | None = None
    """CPU threads of torch; none: its own choice, a core each (for models of a few million parameters 1 is quicker)"""
    patience_seconds: PositiveFloat = 300.0
    """a rank that gave no sign of life for so long is taken for dead: the others stop waiting and say so"""

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if self.path is None and self.grid is None:
            raise ValueError("there are no points: give a [path] table, a [grid] table, or both; empty ones take the defaults")
        if self.perplexity is None and self.tasks is None and self.scorer is None:
            raise ValueError("there is nothing to score by: give a perplexity block, a tasks block, or scorer")
        if self.rl is None and self.grid is not None:
            raise ValueError(
                "grid: beta is the share of RL's update, and rl is not given; give rl, or a [path] from the base to the mid-trained model"
            )
        if self.rl is None and self.path is not None and max(self.path.at or [0.0]) > 1.0:
            raise ValueError(
                f"path.at={self.path.at}: positions behind 1 lie towards the model after RL, and rl is not given; give it, or stay below 1"
            )
        if self.rl is None and self.like == "rl":
            raise ValueError("like=rl needs rl; give it, or take like=midtrain")
        return self

    @property
    def models(self) -> dict[ModelName, Path]:
        """The models that are given, by name."""
        return {"base": self.base, "midtrain": self.midtrain, **({"rl": self.rl} if self.rl is not None else {})}

    @property
    def places(self) -> list[Place]:
        """Every point once: those of the path, then those of the grid."""
        return list(dict.fromkeys([*self.path_places.values(), *(place for row in self.grid_places for place in row)]))

    @property
    def path_places(self) -> dict[float, Place]:
        """Position -> point."""
        return {position: on_path(position) for position in self.path.positions(2 if self.rl else 1)} if self.path else {}

    @property
    def grid_places(self) -> list[list[Place]]:
        """A row for each beta."""
        return grid(self.grid.alpha, self.grid.beta) if self.grid else []

    def evaluation(self, name: str, model: Path) -> EvaluateConfig | None:
        """What `prism evaluate` would be asked for one model; None where the scorer is all. Its output is ours."""
        if self.perplexity is None and self.tasks is None:
            return None
        shared = {key: getattr(self, key) for key in ("perplexity", "tasks", "generation", "threads", "patience_seconds")}
        return EvaluateConfig(output=self.output, models=[ModelEntry(name=name, path=model)], **shared)


class Plan(NamedTuple):
    """A checked recipe."""

    family: Family
    shape: ModelConfig
    """of the model that every point is like"""
    folders: dict[ModelName, Path]
    scorer: Scorer | None


def check(cfg: Config) -> Plan:
    """Everything that can be said without reading weights. Errors: UserError."""
    folders = {name: run_folder.find_weights(path, name) for name, path in cfg.models.items()}
    first, *others = folders.items()
    for name, folder in folders.items():
        if folder.resolve().is_relative_to(cfg.output.resolve()):
            raise UserError(f"output={cfg.output} holds {folder}, which is read; choose another output")
        same = next((other for other in folders if other != name and folders[other].resolve() == folder.resolve()), None)
        if same is not None:
            raise UserError(f"{name} and {same} are one model, {folder}: nothing lies between them; give another, or leave rl out")
    for other in others:
        check_alike(first, other)
    family, shape = families.load(run_folder.hf_files(folders[cfg.like]))
    return Plan(family, shape, folders, find_scorer(cfg.scorer) if cfg.scorer else None)


def find_scorer(name: str) -> Scorer:
    """A function by its dotted name. Errors: UserError for what is none."""
    module, _, function = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it needs is not
        raise UserError(f"scorer={name}: there is no module {module}; put its folder on PYTHONPATH, or correct the name") from None
    if not callable(found):
        raise UserError(
            f"scorer={name}: {module} has no function {function}; the name is that of a module and a function in it, such as my_scores.rhymes"
        )
    return found


def scorer_code(name: str | None) -> str | None:
    """Digest of the file that a scorer that was found is in, not of what it imports; None without a scorer, or without a file."""
    path = getattr(importlib.import_module(name.rpartition(".")[0]), "__file__", None) if name else None
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else None


def apart_from(cfg: Config, plan: Plan) -> list[str]:
    """What has to be said where a model is asked otherwise in the landscape than by itself: positions and chat templates are those of `like`."""
    like = run_folder.hf_files(plan.folders[cfg.like])
    said = []
    for name, folder in plan.folders.items():
        own = run_folder.hf_files(folder)
        difference = model_difference(families.load(own)[1], plan.shape)
        if difference is None and _chat_template(own) != _chat_template(like):
            difference = "they have other chat templates"
        if difference is not None:
            said.append(f"{name} is scored as {cfg.like} is asked, not as by itself: {difference} (of {name} and of {cfg.like}).")
    return said


def _chat_template(folder: Path) -> Any:
    path, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    return json.loads(settings.read_text(encoding="utf-8")).get("chat_template") if settings.is_file() else None
