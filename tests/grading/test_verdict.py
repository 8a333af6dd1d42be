"""A verdict is a verdict: strict extraction, full credit only, and a grader's failure never passes for a wrong answer."""

import itertools

import pytest
import reasoning_gym

from megatron_prism.errors import UserError
from megatron_prism.grading import Question, verdict
from megatron_prism.grading.extract import extract
from megatron_prism.grading.question import Grade


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Answer: 7", "7"),
        ("3 + 4 = 7\nAnswer: 7", "7"),
        ("3 + 4 = 7\nAnswer: 7\n\n  \n", "7"),
        ("  Answer:   -12  ", "-12"),
        ("Answer: ['1', '2']", "['1', '2']"),
        ("Answer:", None),
        ("Answer:   \n", None),
        ("", None),
        ("7", None),
        ("answer: 7", None),
        ("The Answer: 7", None),
        ("Answer: 7\nSo it is.", None),
        ("Answer: 7\nAnswer: 8", "8"),
        ("Answer: 7\nQuestion: next", None),
    ],
)
def test_the_answer_is_on_the_last_line_or_there_is_none(text: str, expected: str | None) -> None:
    assert extract("answer_line", text) == expected


def test_the_whole_text_can_be_the_answer() -> None:
    assert extract("whole", " a b \n") == "a b"
    assert extract("whole", " \n") is None


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(UserError, match="answer_line, whole, boxed, boxed_letter, code_block"):
        extract("boxes", "x")


def _sum(answer: str = "12") -> Question:
    return Question("5 + 7 =", "reasoning_gym", "chain_sum", {"question": "5 + 7 =", "answer": answer, "metadata": {}})


@pytest.mark.parametrize(
    ("text", "correct", "reason"),
    [
        ("Answer: 12", True, "correct"),
        ("5 + 7 = 12\nAnswer: 12", True, "correct"),
        ("Answer: 12.0", True, "correct"),
        ("Answer: 12 apples", False, "wrong"),
        ("Answer: 112", False, "wrong"),
        ("Answer: 13", False, "wrong"),
        ("12", False, "no_answer"),
        ("", False, "no_answer"),
    ],
)
def test_truth_table_of_a_sum(text: str, correct: bool, reason: str) -> None:
    found = verdict(_sum(), text)
    assert (found.correct, found.reason) == (correct, reason)
    assert found.correct == (found.score == 1.0)


def test_partial_credit_is_kept_as_a_score_and_never_counts_as_correct() -> None:
    found = verdict(_sum(), "Answer: 12 apples")
    assert 0 < found.score < 1
    assert not found.correct


@pytest.mark.parametrize(
    "dataset", ["chain_sum", "leg_counting", "count_primes", "gcd", "spell_backward", "number_sorting", "word_sequence_reversal"]
)
def test_every_oracle_answer_is_correct_and_another_questions_answer_is_not(dataset: str) -> None:
    entries = list(reasoning_gym.create_dataset(dataset, seed=5, size=20))
    for entry, other in itertools.pairwise(entries):
        question = Question(entry["question"], "reasoning_gym", dataset, entry, "whole")
        assert verdict(question, entry["answer"]).correct
        assert verdict(question, other["answer"]).correct == (other["answer"] == entry["answer"])


def test_a_grader_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import import_module

    def explode(question: Question, answer: str) -> Grade:
        raise RecursionError("too deep")

    monkeypatch.setitem(import_module("megatron_prism.grading.verdict").GRADERS, "exploding", explode)
    found = verdict(Question("?", "exploding", "", {}), "Answer: 1")
    assert (found.correct, found.score, found.reason) == (False, 0.0, "grader_failed")
    assert found.detail == "RecursionError: too deep"


def test_an_unknown_grader_is_refused() -> None:
    with pytest.raises(UserError, match="known: reasoning_gym, exact, math, choice, contains, code_stdin, code_function"):
        verdict(Question("?", "vibes", "", {}), "Answer: 1")


def test_exact_is_exact() -> None:
    question = Question("?", "exact", "", {"answer": "a b"})
    assert verdict(question, "Answer: a b").correct
    assert not verdict(question, "Answer: a  b").correct
