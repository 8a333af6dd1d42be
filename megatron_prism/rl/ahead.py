"""Generation one step ahead of training (`rollout.steps_ahead = 1`): a step trains while the next one's responses are written.

What is written for step s has the weights that step s - 1 began with; step 0 writes with its own. vLLM's servers write in a thread of rank 0 that
joins no collective; the transformers backend, which shares the trainer's process, writes the same before the trainer's turn, so that the order of
events is one, and a run of either goes on from a checkpoint as if it had not stopped: responses that are written and not trained on lie in it.
Owns: these responses, and how far the generator is off where the policy has moved on since. Refuses: nothing of its own.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prism.engine.ranks import on_main
from megatron_prism.evals.frames import records, write_all
from megatron_prism.generate import Generator
from megatron_prism.rl.records import Prompt, Response
from megatron_prism.rl.rollouts import Draw, message_of

FILE = "responses_ahead.jsonl.zst"
PROBES = 32
"""responses that the generator scores again with the step's weights, to tell what it is off by from what the policy has moved since"""
PROBE_TOKENS = 1024
"""of a prompt with the beginning of its response: vLLM makes the logits of all that it scores at once, outside of its memory plan"""


@dataclass(frozen=True)
class Written:
    """All responses of a draw, in its order, and the seconds that writing them took."""

    draw: Draw
    responses: list[Response]
    seconds: float

    @property
    def num_tokens(self) -> int:
        """Tokens that the model wrote."""
        return sum(sum(one.written) for one in self.responses)


class Ahead:
    """The responses of the next step, being written or there. Every rank has one, and they agree."""

    def __init__(self) -> None:
        self.written: Written | None = None
        self._draw: Draw | None = None
        self._parts: Future[tuple[Any, float]] | None = None

    def begin(self, draw: Draw, generator: Generator | None) -> None:
        """Have a step's responses written: in a thread where one rank's servers write, else now."""
        assert self._draw is None and self.written is None, "one step ahead, not two"
        if draw.writers > 1 or not draw.beside:
            begun = time.perf_counter()
            responses = draw.all(generator)
            self.written = Written(draw, responses, time.perf_counter() - begun)
            return
        self._draw = draw
        if generator is not None:
            self._parts = _in_thread(lambda: _timed(lambda: draw.share(generator, 0)))

    def wait(self) -> None:
        """Until what was begun is written. Errors: UserError, on every rank."""
        draw, parts = self._draw, self._parts
        if draw is None:
            return
        self._draw = self._parts = None
        share, seconds = on_main(lambda: _result(parts))
        self.written = Written(draw, draw.in_order([share]), seconds)

    def take(self, step: int) -> Written | None:
        """The responses of this step, once; None where none were written ahead."""
        self.wait()
        written, self.written = self.written, None
        return written if written is not None and written.draw.step == step else None

    def save(self, folder: Path) -> None:
        """Write down what is there, into a checkpoint's folder. Rank 0 writes."""
        import torch.distributed as dist

        assert self._draw is None, "what is being written is waited for first"
        if dist.get_rank() != 0 or self.written is None:
            return
        draw, responses = self.written.draw, self.written.responses
        head = {"step": draw.step, "seconds": self.written.seconds}
        lines = ({"place": place, **message_of(one)} for (place, _), one in zip(draw.pairs, responses, strict=True))
        write_all(folder / FILE, [head, *lines])

    def load(self, folder: Path, draw_of: Callable[[int], Draw]) -> None:
        """Take up what a checkpoint has; nothing where it was saved without, or for another number of responses to a prompt than the run now
        asks for: they are written anew. Whether they are there is rank 0's word. draw_of: a step's draw, of this run."""
        if not on_main((folder / FILE).is_file):
            return
        head, *lines = records(folder / FILE)
        draw = draw_of(head["step"])
        if [(line["place"], line["sample"]) for line in lines] != draw.pairs:
            return
        responses = [_response(draw.prompts[line.pop("place")], line) for line in lines]
        draw = replace(draw, version=responses[0].weights_version)  # that of then, not of the weights that the run goes on with
        self.written = Written(draw, responses, head["seconds"])


def mismatch(responses: Sequence[Response], generator: Generator | None, logp: Callable[[list[int]], Sequence[Any]]) -> float | None:
    """Mean |log p of the trainer - log p of the generator|, nats, where both have the same weights: of some responses, scored by both.

    logp: the trainer's log-probabilities, from these responses on, by their numbers: called on every rank. None where no response can be scored.
    """

    def score() -> tuple[list[int], list[tuple[float, ...]]]:
        assert generator is not None, "rank 0 writes"
        limit = min(PROBE_TOKENS, generator.longest_pair or PROBE_TOKENS)
        fitting = [place for place, one in enumerate(responses) if one.tokens and len(one.prompt.tokens) < limit]
        chosen = fitting[:: -(-len(fitting) // PROBES) or 1]  # of all prompts, not of the first two
        pairs = [(responses[place].prompt.tokens, responses[place].tokens) for place in chosen]
        scored = [generator.score([(prompt, tokens[: limit - len(prompt)])]) for prompt, tokens in pairs]
        return chosen, [one.logprobs for (one,) in scored]

    chosen, theirs = on_main(score)
    off = []
    for place, row, other in zip(chosen, logp(chosen), theirs, strict=True):
        start, written = len(responses[place].prompt.tokens), np.array(responses[place].written[: len(other)])
        off.append(np.abs(np.asarray(row[start : start + len(other)]) - np.asarray(other))[written])
    found = np.concatenate(off) if off else np.empty(0)
    return float(found.mean()) if found.size else None


def _response(prompt: Prompt, line: dict[str, Any]) -> Response:
    lists = {name: tuple(line[name]) for name in ("tokens", "written", "logprobs")}
    return Response(prompt=prompt, **{**line, **lists})


def _in_thread(work: Callable[[], Any]) -> "Future[Any]":
    """A daemon: a run that ends with an error does not wait for what it no longer wants."""
    found: Future[Any] = Future()

    def run() -> None:
        try:
            found.set_result(work())
        except BaseException as error:  # raised again by who waits
            found.set_exception(error)

    threading.Thread(target=run, name="generation one step ahead", daemon=True).start()
    return found


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    begun = time.perf_counter()
    return work(), time.perf_counter() - begun


def _result(parts: "Future[tuple[Any, float]] | None") -> tuple[Any, float]:
    assert parts is not None, "rank 0 writes"
    return parts.result()
