"""The figures of a step, from groups by hand."""

from dataclasses import replace

import pytest
from graded import group, response, reward

from megatron_prism.rl import metrics
from megatron_prism.rl.rollouts import Group

SUMS = {
    "tokens": 4.0,
    "ratio": 4.0,
    "clipped_low": 1.0,
    "clipped_high": 0.0,
    "capped": 2.0,
    "mismatch": 0.2,
    "mismatch_max": 0.1,
    "mismatch_k3": 0.04,
}


def test_the_figures_are_those_of_a_count_by_hand():
    first, second = group("a", [1.0, 0.0]), group("b", [0.0, 0.0], finish_reason="length")
    found = metrics.figures([first, second], set(), ["math"])
    assert (found["reward"], found["pass_rate"], found["solved"]) == (0.25, 0.25, 0.5)
    assert (found["truncated"], found["length"], found["entropy"]) == (0.5, 3.0, 1.0)
    assert found["groups_all_equal"] == 1.0
    assert found["reward_std"] == pytest.approx(0.1875**0.5)
    assert not [name for name in found if "/" in name], "one domain is all there is to tell"


def test_domains_are_told_apart():
    found = metrics.figures([group("a", [1.0, 1.0], "math"), group("b", [0.0, 1.0], "code")], set(), ["code", "math", "rare"])
    assert (found["reward/math"], found["reward/code"], found["reward"]) == (1.0, 0.5, 0.75)
    assert (found["groups_all_equal/math"], found["groups_all_equal/code"]) == (1.0, 0.0)
    assert "reward/rare" not in found, "none of it was asked"
    assert "reward/math" in metrics.figures([group("a", [1.0, 1.0], "math")], set(), ["code", "math"])


def test_a_failed_grading_is_in_no_figure_of_rewards():
    whole = group("a", [1.0, 0.0])
    found = metrics.figures([replace(whole, rewards=(whole.rewards[0], reward(0.0, failed=True)))], set(), ["math"])
    assert (found["gradings"], found["gradings_failed"], found["reward"], found["pass_rate"]) == (2.0, 1.0, 1.0, 1.0)
    ungraded = metrics.figures([replace(whole, rewards=(reward(0.0, verdict=None, passed_format=False),) * 2)], set(), ["math"])
    assert (ungraded["gradings"], ungraded["gradings_failed"]) == (0.0, 0.0), "past no format gate, nothing is graded"


def test_what_a_tool_put_in_is_neither_length_nor_entropy():
    first = group("a", [1.0])
    said = response(first.prompt, tokens=(1, 2, 3), written=(True, False, True), logprobs=(-1.0, 0.0, -2.0))
    found = metrics.figures([Group(first.prompt, (said,), first.rewards)], set(), ["math"])
    assert (found["length"], found["entropy"]) == (2.0, 1.5)


def test_penalties_are_means_by_name():
    whole = group("a", [1.0, 0.0])
    found = metrics.figures([replace(whole, rewards=(reward(0.5, penalties={"stop": 0.5}), reward(0.0)))], set(), ["math"])
    assert found["penalty_stop"] == 0.25


def test_solved_from_zero_is_a_prompt_that_had_no_right_answer_whenever_it_was_asked_before():
    unsolved = metrics.Unsolved()
    assert unsolved.settle([group("new", [1.0, 0.0]), group("hard", [0.0, 0.0])]) == set(), "nothing is known of a prompt that was never asked"
    assert unsolved.settle([group("hard", [0.0, 0.0])]) == set()
    found = unsolved.settle([group("hard", [0.0, 1.0]), group("new", [0.0, 0.0])])
    assert found == {"hard"}
    assert unsolved.settle([group("hard", [1.0, 1.0])]) == set(), "once"
    assert metrics.figures([group("hard", [0.0, 1.0])], found, ["math"])["solved_from_zero"] == 1.0


def test_a_step_of_training_is_told_by_means_over_its_tokens():
    found = metrics.training(0.5, 2.0, SUMS)
    assert (found["clipped_low"], found["capped"], found["mismatch"], found["mismatch_max"]) == (0.25, 0.5, 0.05, 0.1)
    assert "kl" not in found
    assert metrics.training(0.5, 2.0, {**SUMS, "kl": 8.0})["kl"] == 2.0


def test_speeds_tell_the_share_of_generation():
    found = metrics.speeds({"generation": 3.0, "training": 1.0}, written_tokens=600, writing_seconds=3.0, trained_tokens=800)
    assert (found["generation_share"], found["generated_tokens_per_second"], found["trained_tokens_per_second"]) == (0.75, 200, 800)


def test_the_line_for_people_tells_of_failed_gradings_and_of_steps_without_an_update():
    step = metrics.figures([group("a", [1.0, 0.0])], set(), ["math"]) | metrics.speeds({"generation": 3.0, "training": 1.0}, 6, 3.0, 8) | {"lr": 1e-6}
    assert "nothing to learn from" in metrics.line(3, 10, {**step, "updated": 0.0})
    line = metrics.line(3, 10, {**step, **metrics.training(0.5, 2.0, SUMS), "updated": 1.0, "gradings_failed": 2.0})
    assert "step 3/10" in line and "75 % of it generation" in line and "2 gradings failed" in line
