"""Prompt files: what a policy is asked and how answers are graded, one JSON object a line. Written by `prism prompts`, or by anybody.

    {"id": "deepscaler/17", "domain": "math", "question": "What is 2 + 2?", "prompt": "What is 2 + 2? Put the answer into \\\\boxed{}.",
     "grader": "math", "extraction": "boxed", "entry": {"answer": "4"}, "source": "deepscaler", "solved": 3, "samples": 16}

id: unique among all that a run reads. domain: also the name of a file. prompt: what is asked, where it is more than the question. grader, extraction,
entry, dataset: as in `grading.Question`. source: where it comes from. solved, samples: how many of a model's samples were right, where measured.
Owns: this schema. Refuses: other keys, lines of another shape, an id that is there twice, a file of an output that is unfinished or was changed.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from megatron_prism import artifact
from megatron_prism.config import Block, NonNegative, Positive, validate
from megatron_prism.errors import UserError
from megatron_prism.evals.sources.rows import json_object
from megatron_prism.grading import Question
from megatron_prism.grading.graders import check_question


class PromptLine(Block):
    """A line of a prompt file; see the module's text."""

    id: str
    domain: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    question: str
    prompt: str | None = None
    grader: str
    extraction: str = "answer_line"
    dataset: str = ""
    entry: dict[str, Any]
    source: str | None = None
    solved: NonNegative | None = None
    samples: Positive | None = None

    @property
    def asked(self) -> str:
        """What the model is given."""
        return self.question if self.prompt is None else self.prompt

    @property
    def graded(self) -> Question:
        """As graders take it."""
        return Question(self.question, self.grader, self.dataset, self.entry, self.extraction, self.id)


def read_prompts(path: Path) -> Iterator[PromptLine]:
    """The lines of a file, in order. Errors: those of `check_file`; UserError naming the line that is none of this schema, or whose grader is not
    known."""
    check_file(path)
    seen: set[str] = set()
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            line = _line(text, f"{path}:{number}")
            if line.id in seen:
                raise UserError(f"{path}:{number}: id {line.id!r} is there twice; give each prompt an id of its own")
            seen.add(line.id)
            yield line


def check_file(path: Path) -> None:
    """Errors: UserError for a file that is not there, and for one of a stage's output that is not whole."""
    if (path.parent / artifact.PROVENANCE).is_file():
        artifact.require(path.parent)
    if not path.is_file():
        raise UserError(f"{path} is no prompt file; `prism prompts` writes them, and docs/rl_prompts.md says what a line holds")


def write_prompts(path: Path, lines: Iterable[PromptLine]) -> None:
    """Write a file, whole or not at all."""
    rows = (json.dumps(line.model_dump(exclude_none=True), ensure_ascii=False) for line in lines)
    artifact.write_atomic(path, "".join(f"{row}\n" for row in rows))


def sha256_of(path: Path) -> str:
    """Of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _line(text: str, place: str) -> PromptLine:
    line = validate(json_object(text, place, "a prompt file holds one JSON object a line"), PromptLine, where=place)
    check_question(line.graded)
    return line
