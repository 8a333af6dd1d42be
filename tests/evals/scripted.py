"""A generator that writes what it is told to, for tests that need the true score, and that keeps a list of what it was asked."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from idle_generator import IdleGenerator

from megatron_prism.generate.interface import Completion, Request, Sampling

TOKENS = (1, 2)
LOGPROBS = (-1.0, -0.5)


class Scripted(IdleGenerator):
    """write(request): the text of its completion. asked_in: a file that gets a line for every request that was begun. seconds: of each."""

    def __init__(self, write: Callable[[Request], str], asked_in: Path | None = None, seconds: float = 0.0):
        self.tokenizer = Letters()
        self.write, self.asked_in, self.seconds = write, asked_in, seconds
        self.asked: list[tuple[int, int]] = []

    def generate_requests(self, requests: Sequence[Request], sampling: Sampling, on_done: Callable[[Request, Completion], None]) -> None:
        for request in requests:
            self.asked.append((request.place, request.sample))
            if self.asked_in is not None:
                with self.asked_in.open("a") as file:
                    file.write(f"{request.place} {request.sample}\n")
            time.sleep(self.seconds)
            text = self.write(request)
            on_done(request, Completion(text, TOKENS, "stop" if text else "length", LOGPROBS))


class Letters:
    """A tokenizer: a character's number is its token."""

    chat_template: str | None = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(self, turns: list[dict[str, str]], **_: object) -> list[int]:
        return [ord(letter) for turn in turns for letter in f"<{turn['role']}>{turn['content']}<end>"]
