r"""Whether two mathematical answers have the same value, by math-verify (0.9) without its own time limit, which is SIGALRM.

Owns: the way answers are handed to math-verify, and telling its failure from a wrong answer. Refuses: to search the text for an answer (the
extraction rule has found it: what came out of the box is read as one answer, as LaTeX first and as plain text else).

The same text is right at once, blanks (but those between digits), dollar signs, \text around words and a last full stop aside. docs/grading.md lists
what math-verify accepts: values equal to 6 decimals, 10\% for 10 and for 0.1, units and \text beside a number left out, `x = 5` for 5 (of
an equation the last side counts, and it alone), lists and sets without their order.
"""

import logging
import re
from functools import lru_cache
from typing import Any

from megatron_prism.grading.question import Grade, Question

ANSWER_CHARACTERS = 10_000
GOLDS = 4096
"""questions' answers that a grading process remembers; a training run asks without end"""


def grade_mathematics(question: Question, answer: str) -> Grade:
    """Errors: ValueError where the question's own answer cannot be read; whatever math-verify raises."""
    wanted, answer = str(question.entry["answer"]), answer.strip().removesuffix(".")
    if _bare(wanted) == _bare(answer):
        return Grade(1.0)
    if len(answer) > ANSWER_CHARACTERS:
        return Grade(0.0, detail=f"an answer of {len(answer)} characters is not read")
    gold = _gold(wanted)
    if not gold:
        raise ValueError(f"math-verify cannot read the question's answer {wanted!r}")
    found = _parse(answer)
    if not found:
        return Grade(0.0, detail="math-verify reads no value in it")
    return Grade(float(_same(gold, found)))


def _bare(text: str) -> str:
    """A text without what does not change its meaning."""
    without_marks = re.sub(r"\\(?:text|textbf|textrm|mbox|mathrm)\s*\{([^{}]*)\}", r"\1", text)
    spaced = " ".join(without_marks.replace("$", "").split())
    return re.sub(r"(?<!\d) | (?!\d)", "", spaced).removesuffix(".")  # "1 1/2" is not 11/2


@lru_cache(GOLDS)
def _gold(text: str) -> list[Any]:
    return _parse(text)


def _parse(text: str) -> list[Any]:
    """What math-verify reads in a text that is all answer: a sympy value, its text as a way out; empty: nothing."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limit is off, which is what we want
    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    return list(parse(rf"\boxed{{{text}}}", targets, parsing_timeout=None, raise_on_error=True))


def _same(gold: list[Any], found: list[Any]) -> bool:
    """Errors: what broke the comparison, where no other reading of the two made them equal."""
    from math_verify import verify

    if verify(gold, found, timeout_seconds=None):
        return True
    verify(gold, found, timeout_seconds=None, raise_on_error=True)  # the comparisons again, now without hiding an error
    return False
