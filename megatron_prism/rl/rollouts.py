"""Prompts and a generator make the responses of a step: each rank writes its share, and every rank then holds all of them in one order.

A response is a function of the weights, the seed, the step, its prompt's place in the step and its own number (and, to the last digits, of how many
rows were computed together): not of the layout, and the responses of a prompt may finish in any order. Called on every rank.
Owns: dealing and gathering. Refuses: sampling other than from the policy itself, since what is trained
is the policy at temperature 1; a generator that leaves a response out, or has other weights than the step's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

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


def draw(generator: Generator | None, prompts: Sequence[Prompt], cfg: RolloutConfig, *, seed: int, step: int, writers: int) -> list[Response]:
    """All responses to a step's prompts, prompt by prompt, on every rank.

    step: of the weights that write, and what the generator calls them. writers: ranks that generate, the first so many; the others bring no
    generator. What travels between ranks is what was written, without the prompts, which every rank has; of one writer it is sent out once, and
    not gathered, which would take room for a message of its size from every rank. Errors: UserError, on every rank.
    """
    check_room(prompts, cfg)
    pairs = [(place, sample) for place in range(len(prompts)) for sample in range(cfg.responses_per_prompt)]

    def share(rank: int) -> dict[Pair, dict[str, Any]]:
        if generator is None:
            return {}
        return {pair: _message(one) for pair, one in write(generator, prompts, pairs[rank::writers], cfg, seed=seed, step=step).items()}

    parts = [on_main(lambda: share(0))] if writers == 1 else on_all(share)
    found = {pair: Response(prompt=prompts[pair[0]], **message) for part in parts for pair, message in part.items()}
    missing = [pair for pair in pairs if pair not in found]
    if missing:
        place, sample = missing[0]
        raise UserError(f"step {step}: {len(missing)} of {len(pairs)} responses were not written, such as number {sample} to {prompts[place].id}")
    old = {response.weights_version for response in found.values()} - {step}
    if old:  # a server that died and came back with the weights of its start, say
        raise UserError(f"step {step}: responses were written with weights of step {min(old)}, not {step}'s; the generator lost its weights")
    return [found[pair] for pair in pairs]


def write(
    generator: Generator, prompts: Sequence[Prompt], pairs: Sequence[Pair], cfg: RolloutConfig, *, seed: int, step: int
) -> dict[Pair, Response]:
    """The responses of these pairs."""
    found: dict[Pair, Response] = {}
    first = step * len(prompts)  # a stream of random numbers of its own for every prompt of every step

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
    sampling = Sampling(temperature=1.0, max_new_tokens=limit, stop=cfg.stop, seed=seed)
    if cfg.tool is not None:
        generate_with_tool(generator, requests, sampling, cfg.tool, keep)
    else:
        generator.generate_requests(requests, sampling, keep)
    return found


def _message(response: Response) -> dict[str, Any]:
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
