"""What the trainer is given of graded groups: the right tokens, with the right numbers beside them, and nothing of what failed."""

import math
from dataclasses import replace

import numpy as np
import pytest
from graded import group, response, reward

from megatron_prism.errors import UserError
from megatron_prism.rl.batch import batch_of
from megatron_prism.rl.rollouts import Group
from megatron_prism.rl.settings import ObjectiveConfig

CONFIG = ObjectiveConfig()


def test_a_sequence_is_the_prompt_and_its_response_with_numbers_beside_what_was_written():
    batch = batch_of([group("a", [1.0, 0.0])], CONFIG)
    first, second = batch.sequences
    assert first.tokens.tolist() == [7, 8, 1, 2, 3] and first.scored.tolist() == [False, False, True, True, True]
    assert first.rows["generator"].tolist() == [0, 0, -1, -1, -1]
    assert np.allclose(first.rows["advantage"], 1.0) and np.allclose(second.rows["advantage"], -1.0)
    assert np.allclose(first.rows["weight"], 1 / 6), "one group of six written tokens"
    assert batch.advantages_pg == [[pytest.approx(1.0), pytest.approx(-1.0)]] and batch.num_tokens == 10


def test_what_a_tool_put_in_is_read_and_not_scored():
    whole = group("a", [1.0, 0.0])
    said = response(whole.prompt, tokens=(1, 9, 3), written=(True, False, True), logprobs=(-1.0, 0.0, -1.0))
    batch = batch_of([replace(whole, responses=(said, whole.responses[1]))], CONFIG)
    assert batch.sequences[0].scored.tolist() == [False, False, True, False, True]
    assert np.allclose(batch.sequences[1].rows["weight"], 1 / 5)


def test_what_failed_to_be_graded_is_left_out():
    whole = group("a", [1.0, 0.0, 0.0])
    batch = batch_of([Group(whole.prompt, whole.responses, (*whole.rewards[:2], reward(0.0, failed=True)))], CONFIG)
    assert len(batch.sequences) == 2 and batch.advantages_pg[0] == pytest.approx([1.0, -1.0, 0.0])
    assert np.allclose(batch.sequences[0].rows["weight"], 1 / 6)


def test_a_response_without_a_token_is_left_out():
    whole = group("a", [1.0, 0.0])
    empty = response(whole.prompt, tokens=(), written=(), logprobs=())
    assert len(batch_of([replace(whole, responses=(whole.responses[0], empty))], CONFIG).sequences) == 1
    assert batch_of([replace(whole, responses=(empty, empty))], CONFIG).sequences == [], "an empty group"


def test_equal_rewards_have_no_advantage_and_leave_only_under_dynamic_sampling():
    groups = [group("a", [1.0, 1.0]), group("b", [1.0, 0.0])]
    batch = batch_of(groups, CONFIG)
    assert len(batch.sequences) == 4 and batch.advantages_pg[0] == [0.0, 0.0]
    dynamic = batch_of(groups, CONFIG.model_copy(update={"dynamic_sampling": True}))
    assert len(dynamic.sequences) == 2 and np.allclose(dynamic.sequences[0].rows["weight"], 1 / 6), "one group is averaged over"


@pytest.mark.parametrize(("failed", "sequences"), [((), 3), ((2,), 0), ((0,), 2), ((0, 1, 2), 0)])
def test_under_dynamic_sampling_a_group_is_equal_whatever_failed_in_it(failed: tuple[int, ...], sequences: int) -> None:
    whole = group("a", [1.0, 1.0, 0.0])
    graded = tuple(reward(0.0, failed=True) if place in failed else one for place, one in enumerate(whole.rewards))
    dynamic = CONFIG.model_copy(update={"dynamic_sampling": True})
    assert len(batch_of([replace(whole, rewards=graded)], dynamic).sequences) == sequences


def test_a_reward_that_is_no_number_is_named():
    with pytest.raises(UserError, match=r"prompt 0 \(a\), sample 1"):
        batch_of([group("a", [1.0, math.nan])], CONFIG)


def test_a_row_that_is_added_stands_beside_the_others():
    batch = batch_of([group("a", [1.0, 0.0])], CONFIG).with_row("old", [np.full(5, -2, np.float32)] * 2)
    assert set(batch.sequences[0].rows) == {"generator", "advantage", "weight", "old"}
