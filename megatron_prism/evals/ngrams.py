"""Evaluation tasks -> n-gram files, by which `prism prep` keeps their questions out of training text. A stage of its own:

    prism stage megatron_prism.evals.ngrams output=runs/ngrams 'tasks=["prism_six"]' data_dir=data

    OUTPUT/TASK.jsonl   the word n-grams of the task's questions (data_prep/cleaning/ngrams.py defines the format)

Of a question that stands in a frame (Codeforces' page, GPQA's options) the statement alone counts: training text has other frames.
A question of fewer than n words is one n-gram of all its words; one of fewer than min_words is left out: they may stand anywhere. N-grams that
many questions of a task share are its template ("Your task is to count ..."), say nothing about any question, and are left out too.
Owns: which n-grams stand for a task. Refuses: a task of which nothing is left.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field

from megatron_prism import artifact
from megatron_prism.config import Block, Positive
from megatron_prism.data_prep.cleaning.ngrams import Ngram, ngram_of, write_ngrams
from megatron_prism.data_prep.cleaning.words import words
from megatron_prism.errors import UserError
from megatron_prism.evals.registry import Task, known_tasks, load_tasks


class Config(Block):
    """Evaluation tasks -> n-gram files."""

    output: Path
    """folder to write"""
    tasks: Annotated[list[str], Field(min_length=1)] | None = None
    """names of tasks or suites in the registry, or paths of task files; none: the whole registry"""
    data_dir: Path | None = None
    """folder with the data sets of the tasks; none: the Hugging Face cache, then its hub"""
    n: Positive = 13
    """words in an n-gram; 13 is GPT-3's"""
    min_words: Positive = 8
    """shorter questions are left out; 8 is the smallest n of GPT-3's"""
    max_questions: Positive = 10
    """an n-gram of more questions than this is the task's template, and left out"""
    hashed: bool = False
    """write hashes instead of words, for tasks whose text must not be passed on"""


class TaskNgrams(NamedTuple):
    """What stands for a task, and what was left out: questions that are too short, n-grams of its template."""

    ngrams: list[Ngram]
    questions: int
    too_short: int
    template: int


def task_ngrams(
    task: Task, n: int = 13, min_words: int = 8, max_questions: int = 10, hashed: bool = False, data_dir: Path | None = None
) -> TaskNgrams:
    """The n-grams of a task's questions, each under the first question that has it. Errors: UserError where none is left, or files are missing."""
    questions = task.questions(data_dir=data_dir)
    found: dict[str, tuple[str, list[str]]] = {}
    shared: Counter[str] = Counter()
    too_short = 0
    for question in questions:
        own = words(question.entry.get("statement", question.text))
        too_short += len(own) < min_words
        grams = {" ".join(gram): gram for gram in question_ngrams(own, n)} if len(own) >= min_words else {}
        shared.update(grams.keys())
        for text, gram in grams.items():
            found.setdefault(text, (question.id, gram))
    kept = [ngram_of(name, gram, hashed) for text, (name, gram) in found.items() if shared[text] <= max_questions]
    if not kept:
        raise UserError(
            f"task {task.name}: no n-gram stands for its {len(questions)} questions ({too_short} of fewer than {min_words} words, "
            f"{len(found)} n-grams of the template); lower min_words, or raise n"
        )
    return TaskNgrams(kept, len(questions), too_short, len(found) - len(kept))


def question_ngrams(own: Sequence[str], n: int) -> list[list[str]]:
    """The n-grams of a question's words, in order; all of them as one where there are fewer than n."""
    return [list(own[place : place + n]) for place in range(max(1, len(own) - n + 1))]


def parents(cfg: Config) -> list[Path]:
    """None: the registry comes with the package, and task files are no artifacts."""
    return []


def dry_run(cfg: Config) -> None:
    """List the tasks and their questions."""
    for task in _tasks(cfg):
        print(f"task {task.name}: {task.num_questions} questions -> {cfg.output / task.name}.jsonl")


def run(cfg: Config) -> Path:
    """Write one file for each task; returns the finished folder."""
    tasks = _tasks(cfg)
    if artifact.is_current(cfg.output, cfg):
        return artifact.left_as_it_is(cfg.output)
    artifact.begin(cfg.output, "ngrams", cfg)
    for task in tasks:
        found = task_ngrams(task, cfg.n, cfg.min_words, cfg.max_questions, cfg.hashed, cfg.data_dir)
        write_ngrams(cfg.output / f"{task.name}.jsonl", task.name, cfg.n, found.questions, found.ngrams)
        left_out = f"left out: {found.too_short} questions of fewer than {cfg.min_words} words, {found.template} n-grams of the template"
        print(f"{task.name}: {len(found.ngrams)} n-grams of {found.questions} questions; {left_out}")
    artifact.complete(cfg.output)
    return cfg.output


def _tasks(cfg: Config) -> list[Task]:
    """Those named; or all that ask something of their own (a puzzle's hay is noise that any text may hold)."""
    return load_tasks(cfg.tasks) if cfg.tasks else [task for task in load_tasks(known_tasks()) if task.source != "ruler"]
