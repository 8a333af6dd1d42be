"""A puzzle, hidden in as much hay as a length holds.

What is asked and its answer depend on the seed alone; how much hay is put around it depends on the model's tokenizer. So a question is one and the
same for all models, and its prompt is made when a model is given it. Owns: filling. Refuses: a length that does not hold the puzzle itself.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatron_prism.config import Block, Positive
from megatron_prism.errors import UserError
from megatron_prism.grading import Question

FULL_ENOUGH = 0.99
"""share of a length from which on no more hay is looked for"""
FIRST_PROBE = 16


class Room(NamedTuple):
    """What a prompt may take. measure: tokens of (prompt, beginning of the answer) as a model sees them. answer_tokens: kept free for the rest."""

    measure: Callable[[str, str], int]
    answer_tokens: int


@dataclass(frozen=True)
class Puzzle:
    """head, tail: the prompt around the hay. context(size): the hay, of `size` units, with the puzzle's parts in it. hay: what that is, in words.

    prefix: how the answer begins, put behind the prompt. answers, credit: what the answer must hold: every part counts, or any one is all.
    smallest, largest: sizes. largest None: there is always more hay.
    """

    head: str
    tail: str
    context: Callable[[int], str]
    hay: str
    prefix: str
    answers: tuple[str, ...]
    credit: Literal["all", "any"] = "all"
    smallest: int = 1
    largest: int | None = None

    def prompt(self, size: int) -> str:
        """The prompt with so much hay."""
        return f"{self.head}{self.context(size)}{self.tail}"

    @property
    def shown(self) -> str:
        """The prompt for people: the hay named, not shown."""
        return f"{self.head}[{self.hay}]{self.tail}"


class Draw(NamedTuple):
    """Which question of a task: its number, its seed, the folder with data of yours."""

    number: int
    seed: str
    data_dir: Path | None


class Kind(Block):
    """A kind of puzzle; its fields are a task file's `[params]`."""

    length: Positive = 4096
    """tokens of the prompt and the answer's room together, in the model's own tokenizer; task NAME-LENGTH is NAME at another"""

    @abstractmethod
    def puzzle(self, draw: Draw) -> Puzzle:
        """The puzzle of a draw. Errors: UserError for data that are not there."""


@dataclass(frozen=True)
class LongQuestion(Question):
    """A question with the puzzle behind it; pickled as the plain question, which is all that a grader needs."""

    puzzle: Puzzle | None = field(default=None, compare=False, repr=False)
    length: int = field(default=0, compare=False)

    def prompt(self, room: Room | None) -> str:
        """The text for a model. room None: for people, with the hay left out. Errors: UserError where the length does not hold the puzzle."""
        assert self.puzzle is not None
        return self.puzzle.shown if room is None else fill(self.puzzle, self.length, room, self.id)

    @property
    def prefix(self) -> str:
        """How the answer begins."""
        assert self.puzzle is not None
        return self.puzzle.prefix

    def __reduce__(self) -> tuple[Any, ...]:
        return Question, (self.text, self.grader, self.dataset, self.entry, self.extraction, self.id)


def ask(puzzle: Puzzle, dataset: str, length: int, name: str, extraction: str) -> LongQuestion:
    """The puzzle as a question of a task."""
    entry = {"answers": puzzle.answers, "credit": puzzle.credit}
    return LongQuestion(puzzle.shown, "contains", dataset, entry, extraction, name, puzzle=puzzle, length=length)


def fill(puzzle: Puzzle, length: int, room: Room, name: str) -> str:
    """The prompt with so much hay that prompt, prefix and answer take `length` tokens at most, and 99 % of it where the hay's units allow.

    Sizes are extrapolated from the tokens that the last units took, between a size that fits and one that does not. Errors: UserError.
    """

    def count(size: int) -> int:
        return room.measure(puzzle.prompt(size), puzzle.prefix)

    limit = length - room.answer_tokens
    low, used = puzzle.smallest, count(puzzle.smallest)
    if used > limit:
        enough = 1 << (used + room.answer_tokens - 1).bit_length()  # the next power of two
        raise UserError(
            f"{name}: length={length} must hold the question alone, {used} tokens, and {room.answer_tokens} for the answer; try length={enough}"
        )
    high = None if puzzle.largest is None else puzzle.largest + 1
    step = FIRST_PROBE
    while used < FULL_ENOUGH * limit and (high is None or high - low > 1):
        size = low + step if high is None else min(low + step, high - 1)
        found = count(size)
        unit_tokens = max((found - used) / (size - low), 1e-3)
        if found <= limit:
            low, used = size, found
        else:
            high = size
        step = max(1, int((limit * (1 + FULL_ENOUGH) / 2 - used) / unit_tokens))
    return puzzle.prompt(low)
