"""What is asked, what an answer is worth, and why: the records that every grader shares."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Reason = Literal["correct", "part", "wrong", "no_answer", "timeout", "grader_failed"]
FULL_SCORE = 1.0


@dataclass(frozen=True)
class Question:
    """What is asked, and what its grader needs.

    text: the question. grader: a name in `GRADERS`. dataset: the grader's name for this kind of question. entry: the grader's own record.
    extraction: how an answer is found in a text, see `extract`.
    """

    text: str
    grader: str
    dataset: str
    entry: Mapping[str, Any]
    extraction: str = "answer_line"
    id: str = field(default="", compare=False)


@dataclass(frozen=True)
class Verdict:
    """correct: the grader's full score. score: the grader's, 0 to 1. answer: what was found in the text. detail: why not, where the grader says so.

    reason: "part" where a part of the answer was asked to count as such: as its score. "timeout" where the grader ran out of its own time and
    "grader_failed" where it broke: neither says that the answer is wrong.
    """

    correct: bool
    score: float
    reason: Reason
    answer: str | None = None
    detail: str | None = None


@dataclass(frozen=True)
class Grade:
    """What a grader says of an answer. reason: only where it is neither right nor wrong, or where a part of it counts."""

    score: float
    reason: Literal["part", "timeout", "grader_failed"] | None = None
    detail: str | None = None
