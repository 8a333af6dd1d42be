"""The graders by name, and the verdict as they give it in this process.

reasoning_gym   `score_answer` of the data set.
exact           equality with entry["answer"].
math            the same value as entry["answer"], LaTeX or text; see `mathematics`.
choice          the letter entry["answer"], one of as many letters as there are entry["choices"].
contains        entry["answers"] in the text, letter case aside; entry["credit"]: "all" (each counts) or "any" (one is enough). RULER's.
code_stdin      a program that prints entry["tests"]' outputs; see `programs`.
code_function   a program with entry["function"] that returns them.
"""

import importlib.util
from collections.abc import Callable, Mapping
from functools import cache
from string import ascii_uppercase
from typing import Any

from megatron_prism.errors import UserError
from megatron_prism.grading.extract import check_rule, extract
from megatron_prism.grading.mathematics import grade_mathematics
from megatron_prism.grading.programs import grade_function, grade_stdin
from megatron_prism.grading.question import FULL_SCORE, Grade, Question, Verdict


def check_question(question: Question) -> None:
    """Errors: UserError for an unknown grader or extraction rule, or a grader whose package is not installed."""
    if question.grader not in GRADERS:
        raise UserError(f"there is no grader {question.grader!r}; known: {', '.join(GRADERS)}")
    check_rule(question.extraction)
    module, extra = PACKAGES.get(question.grader, ("", ""))
    if module and not _installed(module):
        raise UserError(f"the grader {question.grader!r} needs the package {module}, which is not installed; pip install 'megatron-prism[{extra}]'")


def grade(question: Question, text: str) -> Verdict:
    """The verdict, in this process and without a limit on a grader's time. Errors: as `check_question`."""
    check_question(question)
    answer = extract(question.extraction, text)
    if answer is None:
        return Verdict(False, 0.0, "no_answer")
    try:
        found = GRADERS[question.grader](question, answer)
    except UserError:
        raise
    except Exception as error:  # a boundary: graders are other people's code, fed with whatever a model writes
        return Verdict(False, 0.0, "grader_failed", answer, f"{type(error).__name__}: {error}")
    correct = found.score >= FULL_SCORE
    return Verdict(correct, found.score, found.reason or ("correct" if correct else "wrong"), answer, found.detail)


def prepare(question: Question) -> None:
    """Import what the question's grader will need."""
    if question.grader in PACKAGES:
        importlib.import_module(PACKAGES[question.grader][0])


@cache
def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _reasoning_gym(question: Question, answer: str) -> Grade:
    return Grade(float(_score_function(question.dataset)(answer, dict(question.entry))))


@cache
def _score_function(dataset: str) -> Callable[[str, dict[str, Any]], float]:
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(dataset)


def _exact(question: Question, answer: str) -> Grade:
    return Grade(float(answer == question.entry["answer"]))


def _choice(question: Question, answer: str) -> Grade:
    letters = ascii_uppercase[: len(question.entry["choices"])]
    wanted = question.entry["answer"]
    if wanted not in letters:
        raise ValueError(f"the answer {wanted!r} is none of the letters {letters}")
    return Grade(float(answer == wanted), detail=None if answer in letters else f"{answer!r} is none of the letters {letters}")


def _contains(question: Question, answer: str) -> Grade:
    wanted, written = question.entry["answers"], answer.lower()
    found = [part for part in wanted if part.lower() in written]
    share = float(bool(found)) if question.entry["credit"] == "any" else len(found) / len(wanted)
    is_part = 0 < share < FULL_SCORE
    return Grade(share, "part" if is_part else None, f"{len(found)} of {len(wanted)} are there" if is_part else None)


GRADERS: dict[str, Callable[[Question, str], Grade]] = {
    "reasoning_gym": _reasoning_gym,
    "exact": _exact,
    "math": grade_mathematics,
    "choice": _choice,
    "contains": _contains,
    "code_stdin": grade_stdin,
    "code_function": grade_function,
}
PACKAGES: Mapping[str, tuple[str, str]] = {"reasoning_gym": ("reasoning_gym", "examples"), "math": ("math_verify", "eval")}
IN_WORKERS = frozenset({"math"})
"""Graders that can run for ever inside a library: `verdict` asks a worker process, which can be killed."""
