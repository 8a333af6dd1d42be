"""How models answer, on responses whose figures are known by hand; intervals against what theory and plain resampling give."""

import math
from typing import Any

import numpy as np
import pytest

from megatron_prism.analysis.behaviour import FIGURES, Answers, difference, figure, length_histogram, mean_interval, mean_over, resampled
from megatron_prism.analysis.transitions import Filtered, Kept, course, transitions
from megatron_prism.evals import scores

SEED = (0, 1)


def response(question: str, correct: bool, tokens: int = 2, logprob: float | None = -1.0, **more: Any) -> dict[str, Any]:
    return {"id": question, "correct": correct, "score": float(correct), "reason": "correct" if correct else "wrong"} | {
        "num_tokens": tokens,
        "logprob": logprob,
        **more,
    }


def drawn(answers: Answers, least: int = 1, resamples: int = 2000) -> Any:
    return resampled(answers, resamples, SEED, least)


def many(rng: np.random.Generator, questions: int, samples: int, gain: float = 0.0) -> Answers:
    rates = np.clip(rng.beta(1, 1, questions) + gain, 0, 1)
    return Answers.of(
        response(f"q{place}", bool(rng.random() < rate), int(rng.integers(1, 400)), -float(rng.random() * 100))
        for place, rate in enumerate(rates)
        for _ in range(samples)
    )


def test_figures_of_a_few_responses_are_those_of_a_hand():
    """Two questions of two samples: 1 of 2 and 0 of 2 right; lengths 1, 3, 10, 100; nats 1, 2, 3, 94."""
    rows = [("a", True, 1, -1.0), ("a", False, 3, -2.0), ("b", False, 10, -3.0), ("b", False, 100, -94.0)]
    found = drawn(Answers.of(response(*row) for row in rows))
    values = {name: found[name][0] for name in FIGURES}
    assert values == pytest.approx(
        {"pass_rate": 0.25, "median_tokens": 6.5, "neg_logprob": 100 / 114, "neg_logprob_correct": 1.0, "neg_logprob_incorrect": 99 / 113}
    )


def test_figures_are_those_of_the_evaluation_s_own_table():
    rng = np.random.default_rng(3)
    rows = [response(f"q{place}", bool(rng.random() < 0.3), int(rng.integers(1, 99)), -float(rng.random())) for place in range(31) for _ in range(3)]
    scored = scores.score([{**row, "answer": None, "finish_reason": "stop"} for row in rows])
    found = {name: values[0] for name, values in drawn(Answers.of(rows)).items()}
    own = [scored.accuracy, scored.median_tokens, scored.negative_logprob, scored.negative_logprob_correct, scored.negative_logprob_incorrect]
    assert list(found.values()) == pytest.approx(own)


def test_every_question_counts_alike_however_many_samples_it_has():
    rows = [response("a", True), *(response("b", right) for right in (False, False, True))]
    assert drawn(Answers.of(rows))["pass_rate"][0] == pytest.approx((1 + 1 / 3) / 2)


def test_parts_of_an_answer_count_as_their_share():
    rows = [response("a", False, reason="part", score=0.25), response("b", True)]
    assert drawn(Answers.of(rows))["pass_rate"][0] == pytest.approx(0.625)


def test_an_interval_is_as_wide_as_the_spread_over_questions_says_and_not_over_samples():
    """Samples of one question agree, so 16 of each say no more than one would."""
    rng = np.random.default_rng(0)
    right = rng.random(200) < 0.4
    rows = [response(f"q{place}", bool(value)) for place, value in enumerate(right) for _ in range(16)]
    found = figure(drawn(Answers.of(rows), resamples=4000)["pass_rate"])
    wide = 2 * 1.96 * math.sqrt(right.mean() * (1 - right.mean()) / 200)
    assert found["high"] - found["low"] == pytest.approx(wide, rel=0.08) and found["low"] < right.mean() < found["high"]


def test_each_draw_is_the_figures_of_the_drawn_questions():
    """Against plain resampling: the drawn questions' responses, written down as often as they were drawn."""
    answers = many(np.random.default_rng(5), 7, 3)
    found = drawn(answers, resamples=20)
    draws = np.random.default_rng(SEED).multinomial(7, np.full(7, 1 / 7), size=20)
    for number, counts in enumerate(draws, 1):
        rows = np.repeat(np.arange(21), counts[answers.question_r])
        assert found["median_tokens"][number] == np.median(answers.tokens_r[rows])
        assert found["neg_logprob"][number] == pytest.approx(-answers.logprob_r[rows].sum() / answers.tokens_r[rows].sum())
        assert found["pass_rate"][number] == pytest.approx(answers.worth_r[rows].mean())


def test_draws_do_not_depend_on_how_many_are_held_at_a_time(monkeypatch):
    from megatron_prism.analysis import behaviour

    answers = many(np.random.default_rng(5), 9, 2)
    whole = drawn(answers, resamples=50)
    monkeypatch.setattr(behaviour, "CELLS", 40)
    for name, values in drawn(answers, resamples=50).items():
        np.testing.assert_allclose(values, whole[name], rtol=1e-12)  # a product's last digit depends on its size


def test_a_paired_difference_knows_what_two_intervals_do_not():
    """One model is right wherever the other is and on 10 of 200 questions more: a difference, though each interval alone holds the other's mean."""
    base = [place % 2 == 0 for place in range(200)]
    better = [right or place % 20 == 1 for place, right in enumerate(base)]
    one, other = (drawn(Answers.of(response(f"q{place}", right) for place, right in enumerate(side))) for side in (base, better))
    changed = difference(one["pass_rate"], other["pass_rate"])
    assert changed["difference"] == pytest.approx(10 / 200) and changed["is_difference"] and changed["low"] > 0
    assert figure(one["pass_rate"])["high"] > 0.5 + 10 / 200
    same = difference(one["pass_rate"], one["pass_rate"])
    assert same == {"difference": 0.0, "low": 0.0, "high": 0.0, "is_difference": False}


def test_too_few_responses_have_no_figure_and_too_few_questions_no_interval():
    rows = [response(f"q{place}", place < 3) for place in range(100)]
    assert figure(drawn(Answers.of(rows), least=4)["neg_logprob_correct"]) is None
    three = figure(drawn(Answers.of(rows), least=3)["neg_logprob_correct"])
    assert three["value"] == 0.5 and three["low"] is None, "one draw in twenty has none of three questions"
    for few in (1, 4):
        assert figure(drawn(Answers.of(rows[:few]))["median_tokens"]) == {"value": 2.0, "low": None, "high": None}
        assert mean_interval([0.5] * few, 100, [0]) == (None, None)
    assert difference(*(drawn(Answers.of(rows), least=4)["neg_logprob_correct"],) * 2) is None


def test_responses_without_log_probabilities_have_all_other_figures():
    rows = [response(f"q{place}", place % 2 == 0, logprob=None) for place in range(40)]
    del rows[0]["logprob"]
    found = {name: figure(values) for name, values in drawn(Answers.of(rows)).items()}
    assert [name for name, one in found.items() if one is None] == ["neg_logprob", "neg_logprob_correct", "neg_logprob_incorrect"]
    assert found["pass_rate"]["value"] == 0.5


def test_the_mean_of_tasks_counts_every_task_alike():
    small, large = Answers.of([response("a", True)] * 2), many(np.random.default_rng(1), 50, 4)
    found = mean_over([drawn(small), drawn(large)][:1] * 2 + [drawn(small)])
    assert found["pass_rate"][0] == 1.0
    two = [drawn(many(np.random.default_rng(seed), 30, 2, gain)) for seed, gain in ((1, -0.2), (2, 0.3))]
    for name in FIGURES:
        np.testing.assert_allclose(mean_over(two)[name], (two[0][name] + two[1][name]) / 2)
    assert drawn(large)["pass_rate"][0] != 1.0


def test_lengths_are_counted_in_equal_bins_for_all_models():
    answers = {name: Answers.of(response("a", True, tokens) for tokens in lengths) for name, lengths in (("one", [0, 3, 4]), ("two", [11, 11]))}
    edges, counts = length_histogram(answers, 3)
    assert edges == [0.0, 4.0, 8.0, 12.0] and counts == {"one": [2, 1, 0], "two": [0, 0, 2]}


def test_transitions_are_counted_by_hand_and_named():
    start = {"a": (0, 16), "b": (0, 16), "c": (5, 16), "d": (16, 16), "e": (0, 16)}
    end = {"a": (3, 16), "b": (0, 16), "c": (0, 16), "d": (16, 16), "e": (1, 16)}
    found = transitions(start, end)
    assert (found["newly_solved"], found["lost"], found["never"], found["kept"]) == (2, 1, 1, 1)
    assert (found["newly_solved_ids"], found["lost_ids"]) == (["a", "e"], ["c"])
    filled = {(row, column): count for row, line in enumerate(found["counts"]) for column, count in enumerate(line) if count}
    assert filled == {(0, 3): 1, (0, 0): 1, (5, 0): 1, (16, 16): 1, (0, 1): 1}
    assert len(found["counts"]) == 17 == len(found["counts"][0])


def test_what_chance_would_move_is_what_two_draws_of_one_model_do_move():
    """A single right answer of two models with one sample each is either's with one half; and over many questions of a fixed rate."""
    assert transitions({"a": (0, 1)}, {"a": (1, 1)})["expected"] == {"newly_solved": 0.5, "lost": 0.5}
    assert transitions({"a": (0, 2)}, {"a": (1, 6)})["expected"] == pytest.approx({"newly_solved": 6 / 8, "lost": 2 / 8})
    rng = np.random.default_rng(0)
    rates = rng.beta(0.3, 1.5, 4000)
    before, after = ({f"q{place}": (int(right), 16) for place, right in enumerate(rng.binomial(16, rates))} for _ in range(2))
    found = transitions(before, after)
    for name in ("newly_solved", "lost"):
        assert found[name] == pytest.approx(found["expected"][name], abs=3 * math.sqrt(found["expected"][name])) and found[name] > 100


def test_the_course_of_hard_prompts_is_followed_by_domain_and_count():
    filtered = {"m0": Filtered("math", 0, 16), "m1": Filtered("math", 1, 16), "c0": Filtered("code", 0, 16), "easy": Filtered("math", 9, 16)}
    steps = [
        Kept(1, {"m0": (0, 4), "c0": (1, 4), "easy": (4, 4), "unknown": (4, 4)}),
        Kept(20, {"m0": (2, 4), "m1": (4, 4), "c0": (3, 4)}),
    ]
    found = {(curve["domain"], curve["right"]): curve["points"] for curve in course(filtered, steps, 1, 1, 200)}
    assert set(found) == {(None, 0), (None, 1), ("math", 0), ("math", 1), ("code", 0)}
    assert [(point["step"], point["prompts"], point["pass_rate"], point["solved"]) for point in found[None, 0]] == [
        (1, 2, 0.125, 0.5),
        (20, 2, 0.625, 1.0),
    ]
    assert [point["step"] for point in found["math", 1]] == [20]
    (joined,) = (curve["points"] for curve in course(filtered, steps, 0, 2, 200) if curve["domain"] == "code")
    assert joined == [{"first_step": 1, "step": 20, "prompts": 1, "responses": 8, "pass_rate": 0.5, "low": None, "high": None, "solved": 1.0}], (
        "a prompt that was asked twice is one prompt"
    )


def test_a_mean_s_interval_is_that_of_its_standard_error():
    values = np.random.default_rng(2).random(400)
    low, high = mean_interval(values.tolist(), 4000, [0])
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.08)
