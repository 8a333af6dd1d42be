"""Retention: general ability before and after, by lm-eval's own tasks and scorers on our generators. A stage of its own:

    prism stage megatron_prism.evals.retention output=runs/general model=runs/midtrain suite=leaderboard_v1

    OUTPUT/scores.json    a score for each of the suite's columns, their mean, and all that lm-eval reports
    OUTPUT/table.md       the table that is printed
    OUTPUT/samples/TASK.jsonl    every question with the model's answer, as lm-eval records it

A suite is a TOML file of lm-eval's tasks (`evals/tasks/retention`, or any path that ends in .toml): shots, metrics, and how a score is normalised.
Owns: suites, running lm-eval, normalising. Refuses: to run without lm-eval (extra "retention"), tasks that lm-eval lacks or whose data it cannot get.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from megatron_prism import artifact
from megatron_prism.config import Block, NonNegative, Positive, read_toml, validate
from megatron_prism.errors import UserError
from megatron_prism.evals.models import find_model, hf_folder
from megatron_prism.evals.registry import TASKS_FOLDER
from megatron_prism.generate.interface import Generator
from megatron_prism.generate.settings import BackendConfig

SUITES_FOLDER = TASKS_FOLDER / "retention"
Results = Mapping[str, Mapping[str, Any]]


class Measure(Block):
    """One column of a suite."""

    column: str
    """its name in our tables"""
    task: str
    """lm-eval's name of the task or group"""
    num_fewshot: NonNegative | None = None
    """none: as lm-eval's own file of the task says"""
    metrics: Annotated[tuple[str, ...], Field(min_length=1)]
    """lm-eval's metric,filter; the score is their mean"""
    choices: Positive | dict[str, Positive] | None = None
    """answers to choose from: the score is normalised, 0 at chance; by subtask: each is, and the score is their mean"""

    def score(self, results: Results) -> float:
        """The column's score, 0 to 1, from lm-eval's results. Errors: UserError where a metric is not there."""
        parts = self.choices if isinstance(self.choices, dict) else {self.task: self.choices}
        found = [_above_chance(self._mean(task, results), choices) for task, choices in parts.items()]
        return sum(found) / len(found)

    def _mean(self, task: str, results: Results) -> float:
        figures = results.get(task, {})
        missing = [metric for metric in self.metrics if not isinstance(figures.get(metric), int | float)]
        if missing:
            raise UserError(
                f"lm-eval reports no {', '.join(missing)} of {task}; it has {', '.join(figures) or 'nothing'}: is this another version of it?"
            )
        return sum(float(figures[metric]) for metric in self.metrics) / len(self.metrics)


class RetentionSuite(Block):
    """lm-eval's tasks that make one average."""

    name: str
    about: str
    tasks: Annotated[tuple[Measure, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> "RetentionSuite":
        columns = [measure.column for measure in self.tasks]
        if len(set(columns)) < len(columns):
            raise ValueError(f"columns need names of their own; got {columns}")
        return self


class Config(Block):
    """General ability by lm-eval."""

    output: Path
    """folder to write"""
    model: Path
    """Hugging Face folder, checkpoint, or finished training run"""
    suite: str = "leaderboard_v1"
    """name of a suite, or path of its .toml"""
    include: Path | None = None
    """folder of further lm-eval task files of yours"""
    limit: Positive | None = None
    """the first so many questions of each task: for a try, not for figures"""
    chat: bool = False
    """ask in the model's chat template, examples as turns"""
    max_length: Positive | None = None
    """tokens that the model reads at most; none: as many as it has positions"""
    generation: BackendConfig = BackendConfig()
    """what runs the model"""


def load_retention(name: str) -> RetentionSuite:
    """A suite by its name, or by the path of its .toml. Errors: UserError for unknown names (with the known ones) and bad files."""
    path = Path(name) if name.endswith(".toml") else SUITES_FOLDER / f"{name}.toml"
    if not path.is_file():
        raise UserError(
            f"there is no retention suite {name!r}; known: {', '.join(known_retentions())}; or give the path of a file that ends in .toml"
        )
    return validate(read_toml(path), RetentionSuite, where=str(path))


def known_retentions() -> list[str]:
    """The suites that come with the package."""
    return sorted(path.stem for path in SUITES_FOLDER.glob("*.toml"))


def measure(
    generator: Generator, suite: RetentionSuite, max_length: int, limit: int | None = None, include: Path | None = None, chat: bool = False
) -> tuple[dict[str, float], dict[str, Any]]:
    """Scores by column, 0 to 1, and what lm-eval reports: results, samples (by task), versions, n-shot.

    Errors: UserError without lm-eval, and for tasks that it does not know or cannot get the data of.
    """
    lm_eval = _lm_eval()
    from megatron_prism.evals.lm_eval_adapter import LmEvalModel

    model, manager = LmEvalModel(generator, max_length), _manager(suite, include)
    scores: dict[str, float] = {}
    report: dict[str, Any] = {"results": {}, "samples": {}, "versions": {}, "n-shot": {}}
    for one in suite.tasks:
        settings = {"num_fewshot": one.num_fewshot, "limit": limit, "apply_chat_template": chat, "fewshot_as_multiturn": chat}
        tasks = _prepared(manager, one.task)
        found = lm_eval.simple_evaluate(model, tasks=tasks, task_manager=manager, log_samples=True, bootstrap_iters=0, **settings)
        for part, filled in report.items():
            filled.update(found[part])
        scores[one.column] = one.score(found["results"])
    return scores, {**report, "lm_eval": _version()}


def _manager(suite: RetentionSuite, include: Path | None) -> Any:
    """lm-eval's index of task files. Its own are thousands, read only where a suite needs one of them."""
    from lm_eval.tasks import TaskManager

    unknown: list[str] = []
    for defaults in [False, True] if include else [True]:
        manager = TaskManager(include_path=str(include) if include else None, include_defaults=defaults)
        unknown = [one.task for one in suite.tasks if one.task not in manager.all_tasks]
        if not unknown:
            return manager
    raise UserError(f"lm-eval {_version()} has no task {', '.join(unknown)}; your own task files are found through include=FOLDER")


def _prepared(manager: Any, task: str) -> list[Any]:
    """lm-eval's object of a task or group, with its data."""
    try:
        found = manager.load([task])
    except Exception as error:  # a boundary: data sets are fetched here, through several libraries
        raise UserError(
            f"lm-eval cannot prepare task {task}: {type(error).__name__}: {error}. Its data come from the Hugging Face hub: "
            "where there is no network, fill the hub's cache elsewhere (HF_HOME) and bring it here"
        ) from None
    return [found["groups"][task]] if task in found["groups"] else list(found["tasks"].values())


def parents(cfg: Config) -> list[Path]:
    """The model, where it is an artifact."""
    return [cfg.model] if (cfg.model / artifact.PROVENANCE).is_file() else []


def dry_run(cfg: Config) -> None:
    """List the model and the suite's tasks."""
    print(f"model: {find_model(cfg.model)}")
    for one in load_retention(cfg.suite).tasks:
        print(f"{one.column}: lm-eval's {one.task}, {'its own' if one.num_fewshot is None else one.num_fewshot} shots")


def run(cfg: Config) -> Path:
    """Score the model; returns the finished folder."""
    suite, _ = load_retention(cfg.suite), find_model(cfg.model)
    _lm_eval()
    if artifact.is_current(cfg.output, cfg, parents(cfg)):
        return artifact.left_as_it_is(cfg.output)
    artifact.begin(cfg.output, "retention", cfg, parents(cfg))
    from megatron_prism.generate import open_backend

    with hf_folder(cfg.model) as folder, open_backend(folder, cfg.generation) as generator:
        scores, report = measure(generator, suite, cfg.max_length or positions(folder), cfg.limit, cfg.include, cfg.chat)
    content = {
        "suite": suite.name,
        "scores": scores,
        "average": _average(scores),
        **{key: value for key, value in report.items() if key != "samples"},
    }
    artifact.write_atomic(cfg.output / "scores.json", json.dumps(content, indent=1, default=str) + "\n")
    artifact.write_atomic(cfg.output / "table.md", table(scores))
    for task, samples in report["samples"].items():
        lines = "".join(json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples)
        artifact.write_atomic(cfg.output / "samples" / f"{task}.jsonl", lines)
    print(table(scores), end="")
    artifact.complete(cfg.output)
    return cfg.output


def table(scores: Mapping[str, float]) -> str:
    """Scores in percent and their mean, as markdown."""
    rows = [*scores.items(), ("average", _average(scores))]
    return "| task | % |\n| --- | ---: |\n" + "".join(f"| {column} | {100 * score:.2f} |\n" for column, score in rows)


def positions(folder: Path) -> int:
    """Tokens that the model of a Hugging Face folder reads at most. Errors: UserError where its config does not say."""
    found = json.loads((folder / "config.json").read_text()).get("max_position_embeddings")
    if not isinstance(found, int):
        raise UserError(f"{folder}/config.json has no max_position_embeddings; set max_length")
    return found


def _average(scores: Mapping[str, float]) -> float:
    return sum(scores.values()) / len(scores)


def _above_chance(score: float, choices: int | None) -> float:
    """0 at chance and below it, 1 at 1; without choices the score as it is."""
    return score if choices is None else max(0.0, (score - 1 / choices) / (1 - 1 / choices))


def _lm_eval() -> Any:
    try:
        import lm_eval.tasks
    except ImportError as error:
        raise UserError(f'retention runs lm-eval, and {error.name} is not installed here: pip install "megatron-prism[retention]"') from None
    return lm_eval


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")
