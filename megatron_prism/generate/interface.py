"""The one interface to text from a model: prompts and a `Sampling` in, `Completion`s out. No torch here; the backends are files beside this one.

A backend promises: greedy results do not depend on the batch; sampled results are a function of (seed, prompt's place, sample's number) and the
model alone, so that the same call gives the same text whatever the batch size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from megatron_prism.errors import UserError

FinishReason = Literal["stop", "length"]
Prompt = str | Sequence[int]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Sampling:
    """How to draw completions."""

    temperature: float = 0.0
    """0 is greedy: the likeliest token, ties to the smaller id"""
    top_p: float = 1.0
    """draw from the smallest set of likeliest tokens whose probabilities (after temperature) reach top_p"""
    max_new_tokens: int = 256
    """a completion that has not ended by then finishes with "length\""""
    stop: tuple[str, ...] = ()
    """strings that end a completion, besides the model's end-of-sequence tokens; the text is cut before them"""
    n: int = 1
    """completions per prompt"""
    seed: int = 0

    def __post_init__(self) -> None:
        rules = [
            (self.temperature >= 0, f"temperature={self.temperature} must be at least 0; 0 is greedy"),
            (0 < self.top_p <= 1, f"top_p={self.top_p} must lie in (0, 1]; 1 is off"),
            (self.max_new_tokens > 0, f"max_new_tokens={self.max_new_tokens} must be at least 1"),
            (self.n > 0, f"n={self.n} must be at least 1"),
            (self.n == 1 or self.temperature > 0, f"n={self.n} greedy completions would all be equal; set temperature, or n=1"),
            (all(self.stop), "stop strings must not be empty"),
        ]
        for holds, message in rules:
            if not holds:
                raise UserError(message)


@dataclass(frozen=True)
class Completion:
    """What a model wrote after one prompt.

    text: without the stop string or the end-of-sequence token. tokens: as drawn, with the end-of-sequence token or the tokens of the stop string.
    logprobs: log p of each of these tokens under the model itself (temperature 1, no top-p), in nats; their number is that of `tokens`.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[float, ...]


class Generator(Protocol):
    """A model that writes."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, progress: Progress | None = None) -> list[list[Completion]]:
        """`sampling.n` completions of each prompt, in the prompts' order.

        prompts: text (tokenised with the special tokens that the tokenizer puts in front) or token ids as they are.
        progress: called with the number of completions that were just finished. Errors: UserError for a prompt that leaves no room.
        """
        ...


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string in it, and whether there was one."""
    places = [place for string in stop if (place := text.find(string)) >= 0]
    return (text[: min(places)], True) if places else (text, False)
