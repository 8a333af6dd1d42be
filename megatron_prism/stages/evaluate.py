"""Evaluate: models -> scores. Perplexity by domain on held-out shards, accuracy on held-out tasks, several models side by side in one table.

OUTPUT/scores.json            every figure
OUTPUT/table.md               the table that is printed
OUTPUT/generations/MODEL/TASK.jsonl     every completion with its verdict
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_prism import artifact
from megatron_prism.config import Block, NonNegative, Positive
from megatron_prism.errors import UserError
from megatron_prism.evals.models import find_model, hf_folder
from megatron_prism.evals.registry import Task, load_task

if TYPE_CHECKING:
    from megatron_prism.evals.perplexity import HeldOut
    from megatron_prism.generate.transformers_backend import TransformersGenerator

SCHEMA_VERSION = 1
Watch = Callable[[str, int], Callable[[int], None]]


class ModelEntry(Block):
    """One model to score."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """its column in the table and its folder of generations"""
    path: Path
    """Hugging Face folder, checkpoint, or finished training run"""


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
    """names in the registry, or paths of task files"""
    num_questions: Positive | None = None
    """the first so many of each task; none: all of them"""


class GenerationConfig(Block):
    """How answers are drawn."""

    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 is greedy"""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """smallest set of likeliest tokens that reaches this probability; 1 is off"""
    n: Positive = 1
    """completions per question; accuracy is their mean"""
    max_new_tokens: Positive | None = None
    """none: as the task says"""
    batch_size: Positive = 32
    """completions at a time"""
    seed: NonNegative = 0
    """of the sampled answers"""

    @model_validator(mode="after")
    def _check(self) -> "GenerationConfig":
        if self.n > 1 and self.temperature == 0:
            raise ValueError(f"generation.n={self.n} greedy completions would all be equal; set generation.temperature, or n=1")
        return self


class Config(Block):
    """Models -> scores."""

    output: Path
    """folder to write the scores to"""
    models: Annotated[list[ModelEntry], Field(min_length=1)]
    """[[models]] tables"""
    perplexity: PerplexityConfig | None = None
    tasks: TasksConfig | None = None
    generation: GenerationConfig = GenerationConfig()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is a device"""
    threads: Positive | None = None
    """CPU threads of torch; none: its own choice, a core each (for models of a few million parameters 1 is quicker)"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """the models' weights and activations"""

    @model_validator(mode="after")
    def _check(self) -> "Config":
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError(f"models need names of their own; got {names}")
        if self.perplexity is None and self.tasks is None:
            raise ValueError("there is nothing to evaluate: give a perplexity block, a tasks block, or both")
        return self


def parents(cfg: Config) -> list[Path]:
    """The models and the blend's prep output, as far as they are artifacts (a foreign Hugging Face folder is not)."""
    blend = [cfg.perplexity.blend if cfg.perplexity.blend.is_dir() else cfg.perplexity.blend.parent] if cfg.perplexity else []
    return [path for path in [*(model.path for model in cfg.models), *blend] if (path / artifact.PROVENANCE).is_file()]


def dry_run(cfg: Config) -> None:
    """Print what would be scored, on what."""
    for model in cfg.models:
        print(f"model {model.name}: {find_model(model.path)}")
    if cfg.perplexity is not None:
        for part in _held_out(cfg.perplexity):
            print(f"perplexity on {part.source} ({part.domain}): {sum(len(window) - 1 for window in part.windows)} tokens")
    for task in _tasks(cfg):
        print(f"task {task.name}: {min(task.num_questions, _limit(cfg) or task.num_questions)} questions, {cfg.generation.n} completions each")


def run(cfg: Config) -> Path:
    """Score every model; returns the finished folder."""
    tasks = _tasks(cfg)
    for model in cfg.models:
        find_model(model.path)
    if artifact.is_current(cfg.output, cfg, parents(cfg)):
        return cfg.output
    held_out = _held_out(cfg.perplexity) if cfg.perplexity else []
    artifact.begin(cfg.output, "evaluate", cfg, parents(cfg))
    scores = {}
    with _progress() as watch, _threads(cfg.threads):
        for model in cfg.models:
            scores[model.name] = _score_model(cfg, model, held_out, tasks, watch)
    content = {"schema_version": SCHEMA_VERSION, "models": scores}
    artifact.write_atomic(cfg.output / "scores.json", json.dumps(content, indent=1) + "\n")
    _report(cfg, scores)
    artifact.complete(cfg.output)
    return cfg.output


def _score_model(cfg: Config, model: ModelEntry, held_out: list["HeldOut"], tasks: list[Task], watch: Watch) -> dict[str, Any]:
    from megatron_prism.generate.transformers_backend import TransformersGenerator

    started = time.monotonic()
    with hf_folder(model.path) as folder:
        generator = TransformersGenerator.load(folder, _device(cfg.device), cfg.dtype, cfg.generation.batch_size)
    scores: dict[str, Any] = {"path": str(model.path), "parameters": generator.model.num_parameters()}
    if held_out:
        assert cfg.perplexity is not None
        _check_tokenizer(generator, cfg.perplexity.blend, model)
        scores["perplexity"] = _perplexity(generator, held_out, cfg.perplexity.batch_size, model.name, watch)
    if tasks:
        scores["tasks"] = {task.name: _accuracy(cfg, generator, task, model.name, watch) for task in tasks}
    return {**scores, "seconds": round(time.monotonic() - started, 2)}


def _perplexity(generator: "TransformersGenerator", parts: list["HeldOut"], batch_size: int, name: str, watch: Watch) -> dict[str, Any]:
    from megatron_prism.evals import perplexity

    found = {}
    for part in parts:
        advance = watch(f"{name}: perplexity, {part.source}", len(part.windows))
        found[part.source] = perplexity.measure(generator.model, generator.tokenizer, part, batch_size, advance)
    domains = perplexity.by_domain((part.domain, found[part.source]) for part in parts)
    figures = {label: {key: value.figures() for key, value in table.items()} for label, table in (("domains", domains), ("sources", found))}
    return dict(figures)


def _accuracy(cfg: Config, generator: "TransformersGenerator", task: Task, name: str, watch: Watch) -> dict[str, Any]:
    from dataclasses import asdict

    from megatron_prism.evals.accuracy import evaluate_task
    from megatron_prism.generate.interface import Sampling

    settings = cfg.generation
    questions = task.questions(_limit(cfg))
    sampling = Sampling(
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_new_tokens=settings.max_new_tokens or task.max_new_tokens,
        stop=task.stop,
        n=settings.n,
        seed=settings.seed,
    )
    advance = watch(f"{name}: {task.name}", len(questions) * settings.n)
    score, records = evaluate_task(generator, task, questions, sampling, advance)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    artifact.write_atomic(cfg.output / "generations" / name / f"{task.name}.jsonl", lines)
    return asdict(score)


def _report(cfg: Config, scores: dict[str, Any]) -> None:
    from megatron_prism.evals import table

    artifact.write_atomic(cfg.output / "table.md", table.markdown(scores))
    table.show(scores, title=f"scores ({cfg.output / 'scores.json'})")
    for line in table.summary(scores):
        print(line)


def _check_tokenizer(generator: "TransformersGenerator", blend: Path, model: ModelEntry) -> None:
    """The shards' ids mean the model's tokens: the vocabulary that prep recorded beside the shards is the model's."""
    from transformers import AutoTokenizer

    folder = (blend if blend.is_dir() else blend.parent) / "tokenizer"
    if not folder.is_dir():
        return  # a blend.toml put together by hand: nothing to compare with, and measure() still refuses ids that the model lacks
    ours = AutoTokenizer.from_pretrained(folder, local_files_only=True).get_vocab()
    theirs = generator.tokenizer.get_vocab()
    differing = [token for token, place in ours.items() if theirs.get(token) != place]
    if differing:
        raise UserError(
            f"model {model.name} reads {len(differing)} of {len(ours)} tokens otherwise than {folder} (such as {differing[0]!r}): "
            "prepare the held-out text with its tokenizer and evaluate it by itself"
        )


def _tasks(cfg: Config) -> list[Task]:
    tasks = [load_task(name) for name in cfg.tasks.names] if cfg.tasks else []
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise UserError(f"tasks need names of their own; got {names}")
    return tasks


def _limit(cfg: Config) -> int | None:
    return cfg.tasks.num_questions if cfg.tasks else None


def _held_out(cfg: PerplexityConfig) -> list["HeldOut"]:
    from megatron_prism.data_prep.blend import load_blend
    from megatron_prism.evals.perplexity import held_out

    return held_out(load_blend(cfg.blend), cfg.seq_len, cfg.max_tokens)


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch finds no CUDA device here; set device=cpu")
    return name


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Inside, torch computes with `count` threads (None: as before)."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _progress() -> Iterator[Watch]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as bars:

        def watch(label: str, total: int) -> Callable[[int], None]:
            bar = bars.add_task(label, total=total)
            return lambda count: bars.advance(bar, count)

        yield watch
