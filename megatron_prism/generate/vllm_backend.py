"""Generation through vLLM servers: everything large. Requests go out as token ids, one a completion; tokens and log-probabilities come back.

Text, ends and stop strings are read from the tokens as every backend reads them (`text`). Each completion has a seed of its own, made of the
sampling's seed, its place and its number.

Owns: spreading requests over servers, new weights. Refuses: what `vllm_server` refuses; prompts without room (`room`).
"""

import hashlib
import json
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_prism.errors import UserError
from megatron_prism.generate import vllm_server
from megatron_prism.generate.interface import Generator, NamedTensors, OnDone, Request, Sampling, Scored
from megatron_prism.generate.room import Fitted, fit, fit_pairs
from megatron_prism.generate.settings import BackendConfig
from megatron_prism.generate.text import Speller, end_of_sequence_ids
from megatron_prism.generate.turns import Turns
from megatron_prism.generate.vllm_server import NAME, Server
from megatron_prism.temporary import TemporaryFolder

COMPLETIONS = "/v1/completions"
Body = dict[str, Any]
Answer = dict[str, Any]


class VllmGenerator(Generator):
    """A Hugging Face folder behind vLLM servers. Close it, or leave its `with`: the servers end with it, and with this process."""

    def __init__(self, folder: Path, config: BackendConfig):
        from transformers import AutoTokenizer

        self.folder, self.config = folder, config
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self.speller = Speller(self.tokenizer, end_of_sequence_ids(folder, self.tokenizer))
        named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")
        self.positions = min((limit for limit in (named, config.max_model_len) if limit is not None), default=None)
        self.longest_pair = None if self.positions is None else self.positions - 1  # vLLM always writes a token more
        self.turns = Turns()
        self._new_weights: TemporaryFolder | None = None
        groups = gpu_groups(config, os.environ)
        self.servers = [Server(folder, config, self.positions, gpus, label=_label(index)) for index, gpus in enumerate(groups)]

    @classmethod
    def open(cls, folder: Path, config: BackendConfig) -> "VllmGenerator":
        """Start the servers and wait until all of them answer."""
        generator = cls(folder, config)
        try:
            for server in generator.servers:
                server.start()
            for server in generator.servers:
                server.wait_ready()
            generator._check_answers()
        except BaseException:
            generator.close()
            raise
        return generator

    def generate_requests(self, requests: Sequence[Request], sampling: Sampling, on_done: OnDone) -> None:
        """See `interface.Generator`."""
        fitted = fit(requests, sampling, self.positions, self.config.on_too_long)

        def finish(place: int, answer: Answer) -> None:
            (choice,) = answer["choices"]
            completion = self.speller.completion(fitted[place], choice["token_ids"], choice["logprobs"]["token_logprobs"], sampling.stop)
            on_done(fitted[place].request, replace(completion, weights_version=version))

        with self.turns.writing() as version:
            self._ask_all([self._body(each, sampling) for each in fitted], finish)

    def _body(self, fitted: Fitted, sampling: Sampling) -> Body:
        return {
            "model": NAME,
            "prompt": list(fitted.prompt),
            "max_tokens": fitted.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p if sampling.temperature > 0 else 1.0,
            "seed": stream_seed(sampling.seed, fitted.request.place, fitted.request.sample),
            "stop": list(sampling.stop),
            "stop_token_ids": self.speller.eos_ids,
            "ignore_eos": True,  # the tokenizer's is among stop_token_ids
            "logprobs": 0,  # of the drawn token alone
            "return_token_ids": True,
        }

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Scored]:
        """See `interface.Generator`."""
        fitted = fit_pairs(pairs, self.longest_pair, self.config.on_too_long)
        scored: dict[int, Scored] = {}

        def keep(place: int, answer: Answer) -> None:
            prompt, continuation = fitted[place]
            table = answer["choices"][0]["prompt_logprobs"][len(prompt) :]
            found = [row[str(token)] for row, token in zip(table, continuation, strict=True)]
            scored[place] = Scored(tuple(each["logprob"] for each in found), all(each["rank"] == 1 for each in found))

        common = {"model": NAME, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        with self.turns.writing():
            self._ask_all([{**common, "prompt": [*prompt, *continuation]} for prompt, continuation in fitted], keep)
        return [scored[place] for place in range(len(fitted))]

    def _ask_all(self, bodies: Sequence[Body], on_answer: Callable[[int, Answer], None]) -> None:
        """Every request to some server, a few more at a time than it works on; on_answer is called in this thread with each answer's place."""
        waiting = deque(enumerate(bodies))
        answers: queue.SimpleQueue[tuple[int, Answer | BaseException]] = queue.SimpleQueue()
        with self._workers(waiting, answers):
            for _ in range(len(bodies)):
                place, answer = self._next(answers)
                if isinstance(answer, BaseException):
                    raise answer
                on_answer(place, answer)
        for server in self.servers if bodies else ():
            server.forget_losses()

    def _next(self, answers: "queue.SimpleQueue[tuple[int, Answer | BaseException]]") -> tuple[int, Answer | BaseException]:
        """The next answer; a server that hangs is noticed meanwhile."""
        while True:
            try:
                return answers.get(timeout=vllm_server.HEALTH_SECONDS)
            except queue.Empty:
                for server in self.servers:
                    server.check()

    @contextmanager
    def _workers(self, waiting: "deque[tuple[int, Body]]", answers: "queue.SimpleQueue[tuple[int, Answer | BaseException]]") -> Iterator[None]:
        """Threads that ask; on the way out nothing is asked any more, and what is under way is dropped."""
        dropped = threading.Event()

        def work(server: Server) -> None:
            while True:
                try:
                    place, body = waiting.popleft()
                except IndexError:
                    return
                try:
                    answers.put((place, server.ask(COMPLETIONS, body, dropped)))
                except BaseException as error:  # raised again in the thread that asked
                    answers.put((place, error))

        each = min(self.config.batch_size + self.config.batch_size // 4 + 1, -(-len(waiting) // len(self.servers)))
        threads = [threading.Thread(target=work, args=(server,), daemon=True) for server in self.servers for _ in range(each)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            dropped.set()
            waiting.clear()
            for server in self.servers:
                server.abandon()

    def _check_answers(self) -> None:
        """One token from every server: shows a vLLM that does not answer as asked."""
        body = self._body(Fitted(Request((0,)), (0,), 1), Sampling())
        for server in self.servers:
            choice = server.ask(COMPLETIONS, body)["choices"][0]
            if not choice.get("token_ids") or len((choice.get("logprobs") or {}).get("token_logprobs") or []) != 1:
                raise UserError(f"the vLLM of {server.python} answers without token ids or log-probabilities; install vLLM 0.32 or newer there")

    @property
    def weights_version(self) -> int:
        """See `interface.Generator`."""
        return self.turns.version

    def update_weights(self, tensors: NamedTensors, version: int | None = None) -> None:
        """See `interface.Generator`. Through a folder in shared memory, which stays until the next: a server that is started again reads it too."""
        from megatron_prism.generate.weights_folder import new_folder

        self._refuse_asleep()
        folder = new_folder(tensors, like=self.folder)
        try:
            self._switch(folder.path, version)
        except BaseException:
            folder.remove()
            raise
        self._drop_new_weights()
        self._new_weights = folder

    def reload(self, folder: Path) -> None:
        """See `interface.Generator`. A server that is started again later reads this folder too."""
        self._refuse_asleep()
        self._switch(folder, None)

    def _switch(self, folder: Path, version: int | None) -> None:
        before = [server.folder for server in self.servers]
        with self.turns.replacing(version):
            try:
                for server in self.servers:
                    server.read_weights(folder)
            except BaseException:
                for server, old in zip(self.servers, before, strict=True):
                    server.folder = old
                raise

    def _refuse_asleep(self) -> None:
        if self.turns.asleep:
            raise UserError("vllm takes no new weights asleep, when it has no memory for them; call wake() first")

    def sleep(self) -> None:
        """See `interface.Generator`. Errors: UserError where the servers were not started so that they can."""
        if self.config.server_flags.get("enable-sleep-mode") is not True:
            raise UserError("a vllm server sleeps only if it was started with server_flags={enable-sleep-mode = true} (GPUs alone have it)")
        self._hand_over("/sleep?level=1&mode=abort", asleep=True)

    def wake(self) -> None:
        """See `interface.Generator`."""
        self._hand_over("/wake_up", asleep=False)

    def _hand_over(self, path: str, asleep: bool) -> None:
        with self.turns.falling_asleep(asleep) as needed:
            for server in self.servers if needed else ():
                with server.watched():
                    server.ask(path, {})

    def weight_checksums(self) -> list[dict[str, str]]:
        """SHA-256 of every parameter of each server, in vLLM's own names and layout: what two servers of the same weights have in common."""
        return [server.ask("/weight_checker", {"action": "checksum"})["checksums"] for server in self.servers]

    def _drop_new_weights(self) -> None:
        if self._new_weights is not None:
            self._new_weights.remove()
            self._new_weights = None

    def close(self) -> None:
        """See `interface.Generator`."""
        for server in self.servers:
            server.close()
        self._drop_new_weights()


def stream_seed(seed: int, place: int, sample: int) -> int:
    """The seed of one completion: 63 bits, a function of its three numbers."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {place} {sample}".encode(), digest_size=8).digest(), "big") >> 1


def gpu_groups(config: BackendConfig, environment: "os._Environ[str] | dict[str, str]") -> list[list[str] | None]:
    """CUDA_VISIBLE_DEVICES of each server of this process: the next `tensor_parallel` of config.gpus, else of what it sees; local ranks of one
    launch take turns.

    A launch of several ranks gives rank r (LOCAL_RANK) the servers r * servers and following; one that names exactly as many devices as this process
    needs has given them to this rank already. Errors: UserError where they are too few. None, for one server in one process that
    names no devices: vLLM's own choice.
    """
    seen = environment.get("CUDA_VISIBLE_DEVICES") if config.gpus is None else ",".join(config.gpus)
    if seen is None and config.servers == 1 and "LOCAL_RANK" not in environment:
        return [None]
    given = [name for name in (seen or "").split(",") if name]
    first = 0 if len(given) == config.servers * config.tensor_parallel else int(environment.get("LOCAL_RANK", "0")) * config.servers
    last = (first + config.servers) * config.tensor_parallel
    names = given if seen is not None else [str(index) for index in range(last)]
    if seen is not None and len(names) < last:
        raise UserError(
            f"servers={config.servers} of tensor_parallel={config.tensor_parallel} GPUs need {last} GPUs up to this rank; "
            f"{'CUDA_VISIBLE_DEVICES' if config.gpus is None else 'gpus'}={seen!r} names {len(names)}"
        )
    size = config.tensor_parallel
    return [names[index * size : (index + 1) * size] for index in range(first, first + config.servers)]


def _label(index: int) -> str:
    rank = os.environ.get("RANK")
    return str(index) if rank is None else f"{rank}-{index}"
