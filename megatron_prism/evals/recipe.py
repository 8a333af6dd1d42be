"""The recipe of an evaluation, and what follows from it without torch: its tasks, how each is sampled, its finished inputs."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_prism import artifact
from megatron_prism.config import Block, NonNegative, Positive, PositiveFloat
from megatron_prism.errors import UserError
from megatron_prism.evals.registry import Task, load_tasks
from megatron_prism.generate.interface import Sampling
from megatron_prism.generate.settings import BackendConfig

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
RUN_KEYS = ("device", "dtype")
"""keys of `generation` that recipes may also write at their top"""


class ModelEntry(Block):
    """One model to score."""

    name: Name
    """its column in the table and its folder of responses"""
    path: Path
    """Hugging Face folder, checkpoint, or finished training run"""
    paper: Annotated[str, Field(pattern=r"^[^/]+/(base|mc|mcs)(/(none|mc|mcs))?$")] | None = None
    """the paper's model that this one repeats, whose figures are shown beside: MODEL/MIX or MODEL/MIX/RL, such as granite-3.3-8b/mcs"""


class PerplexityConfig(Block):
    """Loss on the validation split of a blend."""

    blend: Path
    """prep output, or a blend.toml"""
    seq_len: Positive = 1024
    """tokens predicted per window"""
    max_tokens: Positive | None = 262_144
    """predicted tokens per source at most, spread evenly over the split; none: all"""
    batch_size: Positive = 8
    """windows at a time"""


class TasksConfig(Block):
    """Accuracy on tasks."""

    names: Annotated[list[str], Field(min_length=1)]
    """names of tasks and of suites in the registry, or paths of task files"""
    num_questions: Positive | None = None
    """the first so many of each task; none: all of them"""
    data_dir: Path | None = None
    """folder with the tasks' data sets, for machines without network; what is missing in it is named, with where to put it"""
    chat: bool | None = None
    """ask in the model's chat template, as a user's turn; none: as the task says"""
    without_chat_template: Literal["plain", "refuse"] = "plain"
    """a model without a chat template on a task that asks in a chat: give it the plain prompt (counted), or refuse it"""
    grading_workers: NonNegative | None = None
    """processes that grade beside the generation; 0: none, this process does; none: half of the cores, shared by the ranks of a machine"""


class GenerationConfig(BackendConfig):
    """How answers are drawn, and by what."""

    temperature: Annotated[float, Field(ge=0)] | None = None
    """0 is greedy; none: as the task says"""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """smallest set of likeliest tokens that reaches this probability, 1 is off; none: as the task says"""
    n: Positive | None = None
    """completions per question, accuracy is their mean; none: as the task says"""
    max_new_tokens: Positive | None = None
    """none: as the task says"""
    seed: NonNegative = 0
    """of the sampled answers"""

    @property
    def asked(self) -> dict[str, Any]:
        """What wins over a task's own protocol."""
        given = {key: getattr(self, key) for key in ("temperature", "top_p", "n", "max_new_tokens")}
        return {key: value for key, value in given.items() if value is not None} | {"seed": self.seed}

    @property
    def backend_config(self) -> BackendConfig:
        """The part that runs the model."""
        return BackendConfig(**{key: getattr(self, key) for key in BackendConfig.model_fields})


class FollowConfig(Block):
    """A training run whose checkpoints are scored as they become complete, until the run is."""

    run: Path
    """output of the training"""
    every: Positive = 1
    """only steps that are multiples of this, and the last"""
    poll_seconds: PositiveFloat = 30.0
    """how often to look for new checkpoints"""
    choose: Literal["last", "step", "validation", "test"] = "last"
    """which checkpoint is named: the last; a fixed `step`; the best by `validation`; or, as the paper did, the best on the test tasks (said so)"""
    step: Positive | None = None
    """of choose=step"""
    validation: Annotated[list[str], Field(default_factory=list)]
    """of choose=validation: which of the tasks decide, by mean accuracy; empty: the perplexity over all domains"""

    @model_validator(mode="after")
    def _check(self) -> "FollowConfig":
        if (self.choose == "step") != (self.step is not None):
            raise ValueError("follow.step is the checkpoint of follow.choose=step: give both or neither")
        if self.validation and self.choose != "validation":
            raise ValueError("follow.validation names the tasks of follow.choose=validation; drop it or set choose")
        return self


class EvaluateConfig(Block):
    """Models -> scores."""

    output: Path
    """folder to write the scores to"""
    models: Annotated[list[ModelEntry], Field(default_factory=list)]
    """[[models]] tables; the first is what the others are compared with"""
    follow: FollowConfig | None = None
    """a run in training, whose checkpoints are models step_N"""
    perplexity: PerplexityConfig | None = None
    tasks: TasksConfig | None = None
    generation: GenerationConfig = GenerationConfig.model_validate({})
    threads: Positive | None = None
    """CPU threads of torch; none: its own choice, a core each (for models of a few million parameters 1 is quicker)"""
    regrade: bool = False
    """grade the responses of a finished output again, with today's graders, and score it anew; nothing is generated"""
    patience_seconds: PositiveFloat = 300.0
    """a rank that gave no sign of life for so long is taken for dead: the others stop waiting and say so"""

    @model_validator(mode="before")
    @classmethod
    def _run_keys(cls, data: Any) -> Any:
        """`device` and `dtype` at the top of a recipe stand for those of generation."""
        found = {key: data[key] for key in RUN_KEYS if key in data} if isinstance(data, dict) else {}
        if not found:
            return data
        rest = {key: value for key, value in data.items() if key not in RUN_KEYS}
        return {**rest, "generation": {**found, **rest.get("generation", {})}}

    @model_validator(mode="after")
    def _check(self) -> "EvaluateConfig":
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError(f"models need names of their own; got {names}")
        if "series.json" in names:
            raise ValueError("a model cannot be called 'series.json', a file of the evaluation's own: choose another name")
        steps = [name for name in names if name.removeprefix("step_").isdigit() and name != name.removeprefix("step_")]
        if steps and self.follow is not None:
            raise ValueError(f"step_N are the checkpoints of follow.run: choose other names than {', '.join(steps)}")
        if not names and self.follow is None:
            raise ValueError("there are no models to score: give [[models]] tables, or follow.run")
        if self.perplexity is None and self.tasks is None:
            raise ValueError("there is nothing to evaluate: give a perplexity block, a tasks block, or both")
        if self.regrade and self.tasks is None:
            raise ValueError("regrade=true grades the responses to tasks, and the recipe has none")
        if self.follow is not None and self.follow.choose == "validation" and not self.follow.validation and self.perplexity is None:
            raise ValueError("follow.choose=validation needs follow.validation, tasks that decide, or a perplexity block")
        return self


def parents(cfg: EvaluateConfig) -> list[Path]:
    """The models and the blend's prep output, as far as they are artifacts: a foreign Hugging Face folder is not, a run that is followed not yet."""
    blend = [cfg.perplexity.blend if cfg.perplexity.blend.is_dir() else cfg.perplexity.blend.parent] if cfg.perplexity else []
    return [path for path in [*(model.path for model in cfg.models), *blend] if (path / artifact.PROVENANCE).is_file()]


def tasks_of(cfg: EvaluateConfig) -> list[Task]:
    """The recipe's tasks. Errors: UserError for unknown ones, two of one name, and sampling that makes no sense for one of them."""
    tasks = load_tasks(cfg.tasks.names) if cfg.tasks else []
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise UserError(f"tasks need names of their own; got {names}")
    strange = [name for name in (cfg.follow.validation if cfg.follow else []) if name not in names]
    if strange:
        raise UserError(f"follow.validation names {', '.join(strange)}, which the recipe does not evaluate; its tasks are {', '.join(names)}")
    for task in tasks:
        sampling_of(cfg, task)
    return tasks


def chat_of(cfg: EvaluateConfig, task: Task) -> bool:
    """Whether a task's questions are asked as a user's turn."""
    return task.chat if cfg.tasks is None or cfg.tasks.chat is None else cfg.tasks.chat


def sampling_of(cfg: EvaluateConfig, task: Task) -> Sampling:
    """How a task is sampled: its own protocol, and what the recipe sets over it."""
    return task.sampling(**cfg.generation.asked)
