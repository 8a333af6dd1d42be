"""Scores against tables made by hand, closed forms, and by counting every case."""

import itertools
import math
import random

import numpy as np
import pytest

from megatron_prism.evals.scores import (
    majority,
    mean_and_error,
    mean_pass_at,
    paper_average,
    pass_at_k,
    plain_average,
    score,
)

TOKENS, LOGPROB = 4, -2.0


def _record(question: str, correct: bool, answer: str | None = "1", **changes: object) -> dict[str, object]:
    reason = "no_answer" if answer is None else "correct" if correct else "wrong"
    known = {
        "id": question,
        "correct": correct,
        "score": float(correct),
        "reason": reason,
        "answer": answer,
        "finish_reason": "stop",
        "num_tokens": TOKENS,
        "logprob": LOGPROB,
    }
    return {**known, **changes}


def test_the_score_of_a_table_made_by_hand() -> None:
    table = [
        _record("a", True, "7"), _record("a", True, "7"), _record("a", False, "8"), _record("a", True, "7"),
        _record("b", False, None), _record("b", False, None, finish_reason="length", num_tokens=100, logprob=-10.0), _record("b", True, "3"),
        _record("b", False, "4"),
        _record("c", False, "5"), _record("c", False, "5"), _record("c", False, "6", reason="timeout"),
        _record("c", False, "9", reason="grader_failed"),
    ]  # fmt: skip
    found = score(table)
    assert found.correct == {"a": 0.75, "b": 0.25, "c": 0.0}
    assert found.accuracy == pytest.approx(1 / 3)
    assert found.standard_error == pytest.approx(math.sqrt(((0.75 - 1 / 3) ** 2 + (0.25 - 1 / 3) ** 2 + (1 / 3) ** 2) / 2 / 3))
    assert (found.num_questions, found.completions_per_question) == (3, 4)
    assert (found.no_answer, found.truncated, found.timeout, found.grader_failed) == (2 / 12, 1 / 12, 1 / 12, 1 / 12)
    assert found.graded == pytest.approx(4 / 10)
    assert found.pass_at == pytest.approx({1: 1 / 3, 2: (1 + 1 / 2 + 0) / 3, 4: 2 / 3})
    assert found.majority == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert found.majority_ties == pytest.approx(1 / 3)
    assert (found.mean_tokens, found.median_tokens) == ((11 * 4 + 100) / 12, 4)
    assert found.p95_tokens == pytest.approx(np.percentile([4] * 11 + [100], 95))
    assert found.negative_logprob == pytest.approx((11 * 2 + 10) / (11 * 4 + 100))
    assert found.negative_logprob_correct == pytest.approx(0.5)
    assert found.negative_logprob_incorrect == pytest.approx((7 * 2 + 10) / (7 * 4 + 100))


def test_pass_at_k_is_the_share_of_draws_of_k_samples_that_hold_a_right_one() -> None:
    for n in range(1, 8):
        for correct in range(n + 1):
            samples = [place < correct for place in range(n)]
            for k in range(1, n + 1):
                draws = list(itertools.combinations(samples, k))
                assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws)), (n, correct, k)


def test_pass_at_k_keeps_its_closed_form_where_the_binomials_are_huge() -> None:
    exact = 1 - math.comb(2000 - 3, 500) / math.comb(2000, 500)
    assert pass_at_k(2000, 3, 500) == pytest.approx(exact, rel=1e-12)


def test_pass_at_one_is_the_accuracy_and_pass_at_k_grows_with_k() -> None:
    rng = random.Random(3)
    for _ in range(20):
        n = rng.randrange(1, 70)
        counts = [(n, rng.randrange(n + 1)) for _ in range(rng.randrange(1, 9))]
        found = mean_pass_at(counts)
        assert found[1] == pytest.approx(sum(correct for _, correct in counts) / n / len(counts))
        assert list(found.values()) == sorted(found.values())
        assert found[n] == pytest.approx(sum(correct > 0 for _, correct in counts) / len(counts))


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        (["1", "1", "2"], [True, True, False], (1.0, False)),
        (["1", "2", "2"], [True, False, False], (0.0, False)),
        (["1", "2"], [True, False], (0.5, True)),
        (["1", "2", "3", None], [False, True, False, False], (1 / 3, True)),
        ([None, None, "2"], [False, False, True], (1.0, False)),
        ([None, None], [False, False], (0.0, False)),
        (["x + 1", "x+1", "y"], [True, True, False], (1.0, False)),
    ],
)
def test_the_majority_of_small_votes(answers: list[str | None], correct: list[bool], expected: tuple[float, bool]) -> None:
    assert majority(answers, correct) == pytest.approx(expected)


def test_the_standard_error_is_clustered_by_question() -> None:
    """64 equal samples of a question say no more than one; samples that vary say as much as their question's mean does."""
    alike = [_record(f"q{place}", place < 3) for place in range(10) for _ in range(64)]
    once = [_record(f"q{place}", place < 3) for place in range(10)]
    assert score(alike).standard_error == pytest.approx(score(once).standard_error)
    assert score(once).standard_error == pytest.approx(math.sqrt(0.3 * 0.7 / 9))


def test_the_standard_error_of_yes_and_no_is_the_binomial_one() -> None:
    mean, error = mean_and_error([1.0] * 30 + [0.0] * 70)
    assert mean == pytest.approx(0.3)
    assert error == pytest.approx(math.sqrt(0.3 * 0.7 / 99))
    assert mean_and_error([1.0]) == (1.0, 0.0)


def test_the_two_averages_of_the_papers_tables() -> None:
    """Granite-3.3 after mid-training on MCS: table 11 prints AVG 29.48; and its base: 11.19, where the page's plain mean is 8.93."""
    names = ("livecodebench_v5", "codeforces", "aime24", "aime25", "math500", "gpqa_diamond")
    trained = dict(zip(names, (10.63, 10.52, 37.18, 27.96, 81.11, 29.12), strict=True))
    base = dict(zip(names, (2.15, 1.99, 0.46, 0.31, 26.09, 22.56), strict=True))
    assert paper_average(trained) == pytest.approx(29.48, abs=0.006)
    assert paper_average(base) == pytest.approx(11.19, abs=0.006)
    assert plain_average(base) == pytest.approx(8.93, abs=0.006)
    assert paper_average({name: base[name] for name in names[:5]}) is None
