"""Evaluation tasks, each a small TOML file: the ones in `evals/tasks`, found by name, or any path that ends in .toml.

    name = "chain_sum"               # as in tables and scores.json
    domain = "math"
    source = "reasoning_gym"         # where the questions come from
    dataset = "chain_sum"            # the source's name for them
    seed = 1_000_000_000             # of the first question; questions are numbered from it
    num_questions = 100
    prompt = "{question}\n"          # a completion follows
    extraction = "answer_line"       # grading/extract.py
    max_new_tokens = 200
    [params]                         # of the source

Held out: reasoning-gym's question i of seed s is drawn from s + i, so two different seeds can share questions. Tasks therefore live at seeds of 10^9
and above, training data below it, and `training_entries` also drops what happens to read the same as a held-out question.
Owns: reading tasks, making their questions. Refuses: a task inside the training range, training data inside the held-out range.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_prism.config import Block, Positive, read_toml, validate
from megatron_prism.errors import UserError
from megatron_prism.grading import Question
from megatron_prism.grading.extract import check_rule

HELD_OUT_SEED = 1_000_000_000
TASKS_FOLDER = Path(__file__).parent / "tasks"


class Task(Block):
    """One evaluation task; see the module's text."""

    name: str
    domain: str
    source: Literal["reasoning_gym"] = "reasoning_gym"
    dataset: str
    seed: Annotated[int, Field(ge=HELD_OUT_SEED)] = HELD_OUT_SEED
    num_questions: Positive = 100
    prompt: str = "{question}\n"
    extraction: str = "answer_line"
    max_new_tokens: Positive = 256
    stop: tuple[str, ...] = ()
    params: Annotated[dict[str, Any], Field(default_factory=dict)]

    @model_validator(mode="after")
    def _check(self) -> "Task":
        if self.prompt.count("{question}") != 1:
            raise ValueError(f"prompt={self.prompt!r} must hold {{question}} once")
        check_rule(self.extraction)
        return self

    def questions(self, limit: int | None = None) -> list[Question]:
        """The task's first `limit` questions (None: all). Errors: UserError for an unknown data set or parameters it does not take."""
        count = min(self.num_questions, limit or self.num_questions)
        return [self._question(entry, f"{self.name}/{self.seed + number}") for number, entry in enumerate(self._entries(self.seed, count))]

    def prompt_for(self, question: Question) -> str:
        """What the model is given."""
        return self.prompt.replace("{question}", question.text)

    def training_entries(self, seed: int, count: int) -> Iterator[dict[str, Any]]:
        """reasoning-gym records of the same kind for training: none of them reads as a held-out question, so there may be fewer than `count`.

        seed: of the first; the next count - 1 numbers are used too, and all must lie below HELD_OUT_SEED.
        """
        if not 0 <= seed <= seed + count <= HELD_OUT_SEED:
            raise UserError(f"training seeds {seed} to {seed + count} must lie in 0 to {HELD_OUT_SEED}; the ones above are held out for evaluation")
        return (entry for entry in self._entries(seed, count) if entry["question"].strip() not in self._held_out)

    @cached_property
    def _held_out(self) -> frozenset[str]:
        return frozenset(question.text for question in self.questions())

    def _entries(self, seed: int, count: int) -> Iterator[dict[str, Any]]:
        import reasoning_gym

        try:
            dataset = reasoning_gym.create_dataset(self.dataset, seed=seed, size=count, **self.params)
        except (TypeError, ValueError, AssertionError) as error:
            raise UserError(f"task {self.name}: reasoning-gym refuses dataset={self.dataset!r} with params={self.params}: {error}") from None
        return (dataset[number] for number in range(count))

    def _question(self, entry: dict[str, Any], name: str) -> Question:
        return Question(entry["question"].strip(), self.source, self.dataset, entry, self.extraction, name)


def load_task(name: str) -> Task:
    """A task by its name in the registry, or by the path of its .toml. Errors: UserError for unknown names (with the known ones) and bad files."""
    path = Path(name) if name.endswith(".toml") else TASKS_FOLDER / f"{name}.toml"
    if not path.is_file():
        raise UserError(f"there is no task {name!r}; known: {', '.join(known_tasks())}; or give the path of a task file that ends in .toml")
    return validate(read_toml(path), Task, where=str(path))


def known_tasks() -> list[str]:
    """The names in the registry."""
    return sorted(path.stem for path in TASKS_FOLDER.glob("*.toml"))
