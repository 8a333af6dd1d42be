"""Dealing prompts, and gathering their responses: in one order, however they were written and by whom."""

import math
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from graded import prompt, reward
from idle_generator import IdleGenerator

from megatron_prism.config import validate
from megatron_prism.engine import parallel
from megatron_prism.errors import UserError
from megatron_prism.generate.interface import Completion, Generator, Request, Sampling
from megatron_prism.rl.records import Prompt
from megatron_prism.rl.rollouts import Draw, RolloutConfig, check_room, grouped, message_of, write

CONFIG = RolloutConfig(responses_per_prompt=3, context=10, max_new_tokens=4)
PROMPTS = [prompt("a"), prompt("b", tokens=(7,) * 8)]
DRAW = Draw(PROMPTS, CONFIG, seed=5, step=0, version=0, writers=1)


class Scripted(IdleGenerator):
    """Writes the last request first; the text says what it was asked. lost: how many it forgets."""

    def __init__(self, version: int = 0, lost: int = 0) -> None:
        self.version, self.lost, self.asked = version, lost, []

    @property
    def weights_version(self) -> int:
        return self.version

    def generate_requests(self, requests: Sequence[Request], sampling: Sampling, on_done: Any) -> None:
        self.asked += requests
        for request in list(requests)[self.lost :][::-1]:
            said = f"{request.place}.{request.sample} {sampling.seed}"
            on_done(request, Completion(said, (1, 2), "stop", (-0.5, -0.5), weights_version=self.version))


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    parallel.start(torch.device("cpu"))
    yield
    parallel.stop()


def drawn(generator: Generator | None = None, prompts: Sequence[Prompt] = PROMPTS, step: int = 0) -> list[Any]:
    return Draw(prompts, CONFIG, seed=5, step=step, version=step, writers=1).all(generator or Scripted(step))


def test_responses_that_finish_in_any_order_stand_in_one():
    found = drawn()
    assert [(one.prompt.id, one.sample) for one in found] == [(name, sample) for name in "ab" for sample in range(3)]
    assert [one.text for one in found] == [f"{place}.{sample} 5" for place in range(2) for sample in range(3)]


def test_every_share_of_any_number_of_writers_makes_the_same_responses():
    pairs = [(place, sample) for place in range(2) for sample in range(3)]
    whole = write(Scripted(), DRAW, pairs)
    for writers in (2, 4, 7):
        shares = [write(Scripted(), DRAW, pairs[rank::writers]) for rank in range(writers)]
        assert {pair: one for share in shares for pair, one in share.items()} == whole


def test_every_step_draws_from_random_numbers_of_its_own():
    first, second = Scripted(0), Scripted(1)
    drawn(first), drawn(second, step=1)
    places = [{request.place for request in generator.asked} for generator in (first, second)]
    assert places == [{0, 1}, {2, 3}]


def test_a_response_gets_the_room_that_its_prompt_leaves():
    generator = Scripted()
    drawn(generator)
    assert [request.max_new_tokens for request in generator.asked] == [4, 4, 4, 2, 2, 2]


def test_a_sample_knows_the_weights_that_wrote_it():
    assert {one.weights_version for one in drawn(step=4)} == {4}


def test_responses_of_other_weights_are_refused():
    """A server that died and came back has the weights that it was started with."""
    with pytest.raises(UserError, match="weights of step 0, not 4's"):
        drawn(Scripted(0), step=4)


def test_a_response_that_is_missing_is_named():
    with pytest.raises(UserError, match=r"step 0: 2 of 6 responses were not written, such as number 0 to a"):
        drawn(Scripted(lost=2))


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_log_probabilities_that_are_no_numbers_are_the_generators_error(value, monkeypatch):
    """Trained on, they would end the step as a loss that is no number, and the trainer would be searched for it."""
    message = message_of(write(Scripted(), DRAW, DRAW.pairs)[1, 2])
    parts = {pair: message_of(one) for pair, one in write(Scripted(), DRAW, DRAW.pairs).items()} | {(1, 2): {**message, "logprobs": (-0.5, value)}}
    with pytest.raises(UserError, match=r"step 0: 1 of 6 responses have log-probabilities that are no numbers, such as number 2 to b: the generator"):
        DRAW.in_order([parts])


def test_a_step_without_prompts_and_a_prompt_without_room_are_refused():
    with pytest.raises(UserError, match="no prompts"):
        drawn(prompts=[])
    with pytest.raises(UserError, match=r"prompt long has 10 tokens, which leave no room in rollout.context=10 \(1 of 2"):
        check_room([prompt("short"), prompt("long", tokens=(1,) * 10)], CONFIG)


@pytest.mark.parametrize("writers", [1, 2])
def test_one_writer_sends_and_several_gather_what_was_written_without_the_prompts(writers, monkeypatch):
    """Gathering takes the largest message times the ranks on every GPU, and a prompt of code carries all its tests."""
    sent: dict[str, bytes] = {}

    def broadcast(answer: list[Any], src: int) -> None:
        sent["broadcast"] = pickle.dumps(answer)

    def gather(answers: list[Any], own: Any) -> None:
        sent["gather"] = pickle.dumps(own)
        rest = [(place, sample) for place in range(2) for sample in range(3)][1::2]
        other = draw_share(rest)
        answers[:] = [own, (other, None)]

    def draw_share(pairs: list[tuple[int, int]]) -> dict[tuple[int, int], Any]:
        return {pair: message_of(one) for pair, one in write(Scripted(), DRAW, pairs).items()}

    alone = drawn()
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.broadcast_object_list", broadcast)
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    assert replace(DRAW, writers=writers).all(Scripted()) == alone
    assert list(sent) == ["broadcast" if writers == 1 else "gather"]
    (message,) = sent.values()
    assert b"logprobs" in message and b"Question" not in message and b"what is a?" not in message


def test_sampling_other_than_from_the_policy_is_refused():
    for changed in ({"temperature": 0.7}, {"top_p": 0.9}):
        with pytest.raises(UserError, match="must both be 1"):
            validate(changed, RolloutConfig, where="rollout")


def test_the_papers_constants_are_the_defaults():
    config = RolloutConfig()
    assert (config.responses_per_prompt, config.context, config.temperature, config.top_p) == (16, 16_384, 1.0, 1.0)


def test_groups_are_made_of_neighbours():
    responses, rewards = drawn(), [reward(float(number % 2)) for number in range(6)]
    found = grouped(responses, rewards, 3)
    assert [(one.prompt.id, one.num_correct) for one in found] == [("a", 1), ("b", 2)]
