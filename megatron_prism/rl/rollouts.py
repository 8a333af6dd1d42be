"""Prompts and a generator make the responses of a step: each rank writes its share, and every rank then holds all of them in one order.

A response is a function of the weights, the seed, the step, its prompt's place in the step and its own number (and, to the last digits, of how many
rows were computed together): not of the layout, and the responses of a prompt may finish in any order. Called on every rank.
Owns: dealing and gathering. Refuses: sampling other than from the policy itself, since what is trained
is the policy at temperature 1; a generator that leaves a response out, has other weights than the step's, or log-probabilities that are no numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_prism.config import Block, Positive
from megatron_prism.engine.ranks import on_all, on_main
from megatron_prism.errors import UserError
from megatron_prism.generate.interface import Completion, Generator, Request, Sampling
from megatron_prism.rl.records import Prompt, Response, Reward
from megatron_prism.rl.tools import ToolConfig, Written, generate_with_tool

Pair = tuple[int, int]
"""a prompt's place in the step, and the number of a response to it"""


class RolloutConfig(Block):
    """How responses are drawn. Defaults: PRISM's RL (arXiv 2603.17074, Table 21)."""

    responses_per_prompt: Annotated[int, Field(ge=2)] = 16
    """responses to each prompt: the group that an advantage is taken in (Table 21: 16)"""
    context: Positive = 16_384
    """tokens of a prompt and its response together (Table 21: 16,384)"""
    max_new_tokens: Positive | None = None
    """tokens of a response; none: what the context leaves"""
    temperature: float = 1.0
    """(Table 21: 1.0) what is drawn must be what is trained: no other is taken"""
    top_p: float = 1.0
    """(Table 21: 1.0) no other is taken either"""
    stop: tuple[str, ...] = ()
    """strings that end a response, besides the model's end-of-sequence tokens"""
    steps_ahead: Literal[0, 1] = 0
    """1: the next step's responses are written while this one trains, with weights that are a step old; 0: strictly on-policy, as the paper"""
    tool: ToolConfig | None = None
    """a tool that the policy may call within a response; what it puts in is read, and neither trained on nor graded. none: off"""

    @model_validator(mode="after")
    def _draws_from_the_policy(self) -> "RolloutConfig":
        if (self.temperature, self.top_p) != (1.0, 1.0):
            raise ValueError(
                f"rollout.temperature={self.temperature:g} and rollout.top_p={self.top_p:g} must both be 1: the log-probabilities that are "
                "trained on are those of the policy itself; drop the keys"
            )
        return self

    def room(self, prompt_tokens: int) -> int:
        """Tokens that may be written after a prompt of this length."""
        left = self.context - prompt_tokens
        return left if self.max_new_tokens is None else min(left, self.max_new_tokens)


@dataclass(frozen=True)
class Group:
    """A prompt's responses, in the order of their numbers, with what each is worth."""

    prompt: Prompt
    responses: tuple[Response, ...]
    rewards: tuple[Reward, ...]

    @property
    def num_correct(self) -> int:
        """Responses that the grader calls right."""
        return sum(reward.verdict is not None and reward.verdict.correct for reward in self.rewards)


def grouped(responses: Sequence[Response], rewards: Sequence[Reward], group_size: int) -> list[Group]:
    """Responses with their rewards, by prompt."""
    assert len(responses) == len(rewards) and len(responses) % group_size == 0
    places = range(0, len(responses), group_size)
    return [Group(responses[at].prompt, tuple(responses[at : at + group_size]), tuple(rewards[at : at + group_size])) for at in places]


@dataclass(frozen=True)
class Draw:
    """What is to be written for a step, and by whom. Every rank has the same.

    step: whose prompts these are, and whose random numbers. version: of the weights that write. writers: ranks that generate, the first so many; the
    others bring no generator. beside: whether they can write while the trainer works: servers of one rank, that is.
    """

    prompts: Sequence[Prompt]
    cfg: RolloutConfig
    seed: int
    step: int
    version: int
    writers: int
    beside: bool = False

    @property
    def pairs(self) -> list[Pair]:
        """All responses that are wanted, prompt by prompt."""
        return [(place, sample) for place in range(len(self.prompts)) for sample in range(self.cfg.responses_per_prompt)]

    def all(self, generator: Generator | None) -> list[Response]:
        """All responses, prompt by prompt, on every rank.

        What travels between ranks is what was written, without the prompts, which every rank has; of one writer it is sent out once, and not
        gathered, which would take room for a message of its size from every rank. Errors: UserError, on every rank.
        """
        check_room(self.prompts, self.cfg)
        if self.writers == 1:
            return self.in_order([on_main(lambda: self.share(generator, 0))])
        return self.in_order(on_all(lambda rank: self.share(generator, rank)))

    def share(self, generator: Generator | None, rank: int) -> dict[Pair, dict[str, Any]]:
        """What one rank writes of it; it joins no collective."""
        if generator is None:
            return {}
        check_room(self.prompts, self.cfg)
        return {pair: message_of(one) for pair, one in write(generator, self, self.pairs[rank :: self.writers]).items()}

    def in_order(self, parts: Sequence[dict[Pair, dict[str, Any]]]) -> list[Response]:
        """The responses of all ranks' shares. Errors: UserError where one is missing, has other weights, or no numbers for log-probabilities."""
        found = {pair: Response(prompt=self.prompts[pair[0]], **message) for part in parts for pair, message in part.items()}
        missing = [pair for pair in self.pairs if pair not in found]
        if missing:
            (place, sample), wanted = missing[0], len(self.pairs)
            raise UserError(
                f"step {self.step}: {len(missing)} of {wanted} responses were not written, such as number {sample} to {self.prompts[place].id}"
            )
        other = {response.weights_version for response in found.values()} - {self.version}
        if other:  # a server that died and came back with the weights of its start, say
            raise UserError(
                f"step {self.step}: responses were written with weights of step {min(other)}, not {self.version}'s; the generator lost its weights"
            )
        wrong = [found[pair] for pair in self.pairs if not all(map(math.isfinite, found[pair].logprobs))]
        if wrong:
            raise UserError(
                f"step {self.step}: {len(wrong)} of {len(self.pairs)} responses have log-probabilities that are no numbers, such as number "
                f"{wrong[0].sample} to {wrong[0].prompt.id}: the generator's model overflows; look at generation.dtype and the weights"
            )
        return [found[pair] for pair in self.pairs]


def write(generator: Generator, draw: Draw, pairs: Sequence[Pair]) -> dict[Pair, Response]:
    """The responses of these pairs."""
    prompts, cfg = draw.prompts, draw.cfg
    found: dict[Pair, Response] = {}
    first = draw.step * len(prompts)  # a stream of random numbers of its own for every prompt of every step

    def keep(request: Request, answer: Completion | Written) -> None:
        place = request.place - first
        found[place, request.sample] = Response(
            prompt=prompts[place],
            sample=request.sample,
            tokens=answer.tokens,
            written=answer.written if isinstance(answer, Written) else (True,) * len(answer.tokens),
            logprobs=answer.logprobs,
            text=answer.text,
            finish_reason=answer.finish_reason,
            weights_version=generator.weights_version,
        )

    requests = [Request(prompts[place].tokens, first + place, sample, cfg.room(len(prompts[place].tokens))) for place, sample in pairs]
    if not requests:
        return found
    limit = max(cfg.room(len(prompts[place].tokens)) for place, _ in pairs)
    sampling = Sampling(temperature=1.0, max_new_tokens=limit, stop=cfg.stop, seed=draw.seed)
    if cfg.tool is not None:
        generate_with_tool(generator, requests, sampling, cfg.tool, keep)
    else:
        generator.generate_requests(requests, sampling, keep)
    return found


def message_of(response: Response) -> dict[str, Any]:
    """All of a response but its prompt."""
    return {each.name: getattr(response, each.name) for each in fields(response) if each.name != "prompt"}


def check_room(prompts: Sequence[Prompt], cfg: RolloutConfig) -> None:
    """Errors: UserError for a step without prompts, and for prompts that leave no room for a response."""
    if not prompts:
        raise UserError("a step has no prompts: none were given, or all were dropped; look at [prompts]")
    long = [prompt for prompt in prompts if cfg.room(len(prompt.tokens)) < 1]
    if long:
        raise UserError(
            f"prompt {long[0].id} has {len(long[0].tokens)} tokens, which leave no room in rollout.context={cfg.context} "
            f"({len(long)} of {len(prompts)} prompts); drop them, or raise rollout.context"
        )
