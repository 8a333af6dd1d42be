"""Evaluation tasks, each a small TOML file: the ones in `evals/tasks`, found by name, or any path that ends in .toml; and suites, lists of tasks.

    name = "aime24"                  # as in tables and scores.json
    domain = "math"
    source = "dataset"               # or "reasoning_gym", the default, which makes its questions by `seed`; or "ruler", puzzles in a long context
    dataset = "HuggingFaceH4/aime_2024"     # on the Hugging Face hub; of reasoning_gym and ruler: their name for the kind of question
    revision = "2fe88a2f1091d5048c0f36abc874fb997b3dd99a"
    files = ["data/train-00000-of-00001.parquet"]
    rows = "plain"                   # sources/__init__.py: how a row is read
    num_questions = 30               # of a dataset: as many as the benchmark has
    prompt = '...{question}...'      # a completion follows; [prompts] has others for a grader of that name
    chat = true                      # the prompt is a user's turn, for models with a chat template
    extraction = "boxed"             # grading/extract.py
    n = 64                           # the protocol: completions per question, and how they are sampled
    temperature = 0.6
    top_p = 0.95
    max_new_tokens = 32768
    citation = "..."
    [params]                         # of the reader of rows, of reasoning-gym, or of the puzzle

NAME-LENGTH is a task of source "ruler" at another `params.length`, such as niah_single_1-32768; a suite with `lengths` has its tasks at each of them,
SUITE-LENGTH at one.

Held out: reasoning-gym's question i of seed s is drawn from s + i, so two different seeds can share questions. Tasks therefore live at seeds of 10^9
and above, training data below it, and `training_entries` also drops what happens to read the same as a held-out question.
Owns: reading tasks and suites, making their questions. Refuses: a task inside the training range, training data inside the held-out range, files that
are not there (with what to put where), two questions of one name. Warns of a data set with more or fewer questions than the benchmark has.
"""

import difflib
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from megatron_prism.config import Block, Positive, read_toml, validate
from megatron_prism.errors import UserError
from megatron_prism.evals.ruler import KINDS, Draw, Kind, LongQuestion, Room, ask
from megatron_prism.evals.sources import READERS, Reader, Shape
from megatron_prism.evals.sources.files import HubFiles, find, rows
from megatron_prism.evals.sources.rows import Dropped
from megatron_prism.generate.interface import Sampling
from megatron_prism.grading import Question
from megatron_prism.grading.extract import check_rule

HELD_OUT_SEED = 1_000_000_000
TASKS_FOLDER = Path(__file__).parent / "tasks"
SUITES_FOLDER = TASKS_FOLDER / "suites"


class Selection(NamedTuple):
    """A task's questions, and what became of the rows that were read for them. dropped: rows by reason."""

    questions: list[Question]
    num_rows: int
    dropped: Counter[str]


class Task(Block):
    """One evaluation task; see the module's text."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    domain: str
    source: Literal["reasoning_gym", "dataset", "ruler"] = "reasoning_gym"
    dataset: str
    revision: str | None = None
    files: tuple[str, ...] = ()
    rows: Shape = "plain"
    seed: Annotated[int, Field(ge=HELD_OUT_SEED)] = HELD_OUT_SEED
    num_questions: Positive = 100
    prompt: str = "{question}\n"
    prompts: Annotated[dict[str, str], Field(default_factory=dict)]
    chat: bool = False
    extraction: str = "answer_line"
    n: Positive = 1
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Positive = 256
    stop: tuple[str, ...] = ()
    citation: str | None = None
    params: Annotated[dict[str, Any], Field(default_factory=dict)]

    @model_validator(mode="after")
    def _check(self) -> "Task":
        if self.name == "perplexity" or self.name.startswith("hf_"):
            raise ValueError(f"name={self.name!r} is what an evaluation calls a folder of its own (perplexity, hf_...): choose another")
        for prompt in (self.prompt, *self.prompts.values()):
            if prompt.count("{question}") != 1:
                raise ValueError(f"prompt={prompt!r} must hold {{question}} once")
        check_rule(self.extraction)
        self.sampling()
        if self.source == "dataset":
            self._reader()
            missing = [key for key in ("files", "num_questions") if key not in self.model_fields_set]
            if missing:
                raise ValueError(f"source=dataset needs {', '.join(missing)}")
        if self.source == "ruler":
            self._kind()
        return self

    def questions(self, limit: int | None = None, data_dir: Path | None = None) -> list[Question]:
        """The task's first `limit` questions (None: all). data_dir: where a data set's files are, see `sources/files.py`.

        Errors: UserError for an unknown data set, parameters it does not take, files that are not there, rows of another schema.
        """
        return self.selection(limit, data_dir).questions

    def selection(self, limit: int | None = None, data_dir: Path | None = None) -> Selection:
        """The questions with the count of what was dropped; with a limit, rows are read until it is reached. Errors: as `questions`."""
        count = min(self.num_questions, limit or self.num_questions)
        if self.source == "dataset":
            return self._selected(count if limit else None, data_dir)
        if self.source == "ruler":
            return Selection([self._puzzle(number, data_dir) for number in range(count)], count, Counter())
        asked = [self._question(entry, f"{self.name}/{self.seed + number}") for number, entry in enumerate(self._entries(self.seed, count))]
        return Selection(asked, len(asked), Counter())

    def prompt_for(self, question: Question, room: Room | None = None) -> str:
        """What the model is given. room: of the model that is asked; without it, a long context is named, not shown. Errors: UserError."""
        if isinstance(question, LongQuestion):
            return question.prompt(room)
        return self.prompts.get(question.grader, self.prompt).replace("{question}", question.text)

    def prefix_for(self, question: Question) -> str:
        """How the answer begins: put behind the prompt, in a chat at the start of the model's turn."""
        return question.prefix if isinstance(question, LongQuestion) else ""

    def sampling(self, **overrides: Any) -> Sampling:
        """The task's protocol, with some of it (or the seed) replaced. Errors: UserError for sampling that makes no sense."""
        protocol = {"temperature": self.temperature, "top_p": self.top_p, "max_new_tokens": self.max_new_tokens, "stop": self.stop, "n": self.n}
        return Sampling(**{**protocol, **overrides})

    def training_entries(self, seed: int, count: int) -> Iterator[dict[str, Any]]:
        """reasoning-gym records of the same kind for training: none of them reads as a held-out question, so there may be fewer than `count`.

        seed: of the first; the next count - 1 numbers are used too, and all must lie below HELD_OUT_SEED.
        """
        return (entry for _, entry in self._training(seed, count))

    def training_questions(self, seed: int, count: int) -> Iterator[Question]:
        """`training_entries` as questions, of names TASK/train/NUMBER: two ranges of seeds that overlap have names in common."""
        return (self._question(entry, f"{self.name}/train/{number}") for number, entry in self._training(seed, count))

    def _training(self, seed: int, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """`training_entries`, each with the number that it is drawn from."""
        if self.source != "reasoning_gym":
            raise UserError(f"task {self.name} is a benchmark's data set: there is no training data of its kind")
        if not 0 <= seed <= seed + count <= HELD_OUT_SEED:
            raise UserError(f"training seeds {seed} to {seed + count} must lie in 0 to {HELD_OUT_SEED}; the ones above are held out for evaluation")
        entries = enumerate(self._entries(seed, count), start=seed)
        return ((number, entry) for number, entry in entries if entry["question"].strip() not in self._held_out)

    @cached_property
    def _held_out(self) -> frozenset[str]:
        return frozenset(question.text for question in self.questions())

    def _entries(self, seed: int, count: int) -> Iterator[dict[str, Any]]:
        import reasoning_gym

        try:
            dataset = reasoning_gym.create_dataset(self.dataset, seed=seed, size=count, **self.params)
        except (TypeError, ValueError, AssertionError) as error:
            raise UserError(f"task {self.name}: reasoning-gym refuses dataset={self.dataset!r} with params={self.params}: {error}") from None
        return (_drawn(partial(dataset.__getitem__, number), f"{self.dataset} {seed + number}") for number in range(count))

    def _question(self, entry: dict[str, Any], name: str) -> Question:
        return Question(entry["question"].strip(), self.source, self.dataset, entry, self.extraction, name)

    def _kind(self) -> Kind:
        if self.dataset not in KINDS:
            raise ValueError(f"source=ruler has no dataset={self.dataset!r}; known: {', '.join(KINDS)}")
        return validate(self.params, KINDS[self.dataset], where=f"task {self.name}: [params] of dataset={self.dataset}")

    def _puzzle(self, number: int, data_dir: Path | None) -> LongQuestion:
        kind = self._kind()
        name = f"{self.name}/{self.seed + number}"
        return ask(
            kind.puzzle(Draw(number, f"{_at_length(self.name)[0]} {self.seed + number}", data_dir)), self.dataset, kind.length, name, self.extraction
        )

    def _reader(self) -> Reader:
        return validate(self.params, READERS[self.rows], where=f"task {self.name}: [params] of rows={self.rows}")

    def _selected(self, limit: int | None, data_dir: Path | None) -> Selection:
        reader, dropped, num_rows = self._reader(), Counter[str](), 0
        found: dict[str, Question] = {}
        for path in find(HubFiles(self.name, self.dataset, self.revision, self.files), data_dir):
            for row in rows(path):
                if len(found) == limit:
                    return Selection(list(found.values()), num_rows, dropped)
                num_rows += 1
                asked = reader.read(row)
                if isinstance(asked, Dropped):
                    dropped[asked.reason] += 1
                    continue
                name = f"{self.name}/{asked.id}"
                if name in found:
                    raise UserError(f"task {self.name}: {row.place} is a second question of the name {asked.id}; is a file there twice?")
                found[name] = Question(asked.text, asked.grader, self.dataset, asked.entry, self.extraction, name)
        if not found:
            raise UserError(f"task {self.name}: no question is left of {num_rows} rows ({dict(dropped) or 'the files are empty'})")
        if limit is None and len(found) != self.num_questions:
            message = f"task {self.name}: {len(found)} questions of {num_rows} rows, where the benchmark has {self.num_questions}"
            warnings.warn(f"{message}: scores are not the benchmark's", stacklevel=3)
        return Selection(list(found.values()), num_rows, dropped)


class Suite(Block):
    """A named list of tasks: a TOML file in `evals/tasks/suites`, or any path that ends in .toml."""

    name: str
    about: str
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    lengths: tuple[Positive, ...] = ()
    """each task at each of these `params.length`s"""

    @property
    def names(self) -> list[str]:
        """Of its tasks, in order."""
        return [f"{task}-{length}" for task in self.tasks for length in self.lengths] or list(self.tasks)

    def load(self) -> list[Task]:
        """Its tasks, in order."""
        return [load_task(name) for name in self.names]


def _drawn(make: Callable[[], dict[str, Any]], seed: str) -> dict[str, Any]:
    """A record. Some generators (list_functions, reasoning-gym 0.1.25) draw from Python's own random numbers too, and would ask anew each time."""
    before = random.getstate()
    random.seed(seed)
    try:
        return make()
    finally:
        random.setstate(before)


def load_task(name: str) -> Task:
    """A task by its name in the registry, or by the path of its .toml. Errors: UserError for unknown names (with the known ones) and bad files."""
    base, length = (name, None) if name in known_tasks() else _at_length(name)
    path = Path(name) if name.endswith(".toml") else TASKS_FOLDER / f"{base}.toml"
    if not path.is_file():
        near = difflib.get_close_matches(name, known_tasks(), n=3)
        known = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known_tasks())}"
        raise UserError(f"there is no task {name!r}; {known} A file of your own is named by its path, which ends in .toml")
    content = read_toml(path)
    if length is not None:
        if content.get("source") != "ruler":
            raise UserError(f"task {name!r}: {base} has no length; a length belongs to tasks of source ruler")
        content |= {"name": name, "params": {**content.get("params", {}), "length": length}}
    return validate(content, Task, where=str(path))


def load_suite(name: str) -> Suite:
    """A suite by its name, or by the path of its .toml. Errors: UserError for unknown names (with the known ones), bad files, unknown tasks in it."""
    base, length = (name, None) if name in known_suites() else _at_length(name)
    path = Path(name) if name.endswith(".toml") else SUITES_FOLDER / f"{base}.toml"
    if not path.is_file():
        raise UserError(f"there is no suite {name!r}; known: {', '.join(known_suites())}; or give the path of a suite file that ends in .toml")
    suite = validate(read_toml(path), Suite, where=str(path))
    if length is not None:
        suite = suite.model_copy(update={"name": name, "lengths": (length,)})
    suite.load()
    return suite


def load_tasks(names: Sequence[str]) -> list[Task]:
    """Tasks by names of tasks and of suites, which stand for their tasks; each once. Errors: UserError for unknown names."""
    suites = known_suites()
    listed = [one for name in names for one in (load_suite(name).names if name in suites or _at_length(name)[0] in suites else (name,))]
    return [load_task(name) for name in dict.fromkeys(listed)]


def _at_length(name: str) -> tuple[str, int | None]:
    """NAME-LENGTH taken apart."""
    base, _, digits = name.rpartition("-")
    return (base, int(digits)) if base and digits.isascii() and digits.isdigit() else (name, None)


def known_tasks() -> list[str]:
    """The names in the registry."""
    return sorted(path.stem for path in TASKS_FOLDER.glob("*.toml"))


def known_suites() -> list[str]:
    """The suites that come with the package."""
    return sorted(path.stem for path in SUITES_FOLDER.glob("*.toml"))
