"""Finding the answer in what a model wrote: strict rules, named, so that a format failure is never counted as a wrong answer or a right one.

answer_line   the last line that is not blank must begin with "Answer:"; the rest of that line, stripped, is the answer.
              Nothing may follow it, an empty rest is no answer, an "Answer:" on an earlier line does not count.
whole         the whole text, stripped; blank text is no answer.
"""

from collections.abc import Callable

from megatron_prism.errors import UserError

ANSWER_MARK = "Answer:"


def answer_line(text: str) -> str | None:
    """The answer on the last line, None where that line is no answer line."""
    last = text.rstrip().rpartition("\n")[2].strip()
    return last.removeprefix(ANSWER_MARK).strip() or None if last.startswith(ANSWER_MARK) else None


def whole(text: str) -> str | None:
    """The whole text, None where it is blank."""
    return text.strip() or None


RULES: dict[str, Callable[[str], str | None]] = {"answer_line": answer_line, "whole": whole}


def extract(rule: str, text: str) -> str | None:
    """The answer that a text gives under a rule; None: it gives none. Errors: UserError for an unknown rule."""
    check_rule(rule)
    return RULES[rule](text)


def check_rule(rule: str) -> None:
    """Errors: UserError for a rule that does not exist."""
    if rule not in RULES:
        raise UserError(f"there is no extraction rule {rule!r}; known: {', '.join(RULES)}")
