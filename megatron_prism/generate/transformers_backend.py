"""Generation in this process through `transformers`: for small models, any machine, and as the oracle in tests.

transformers loads and runs the model; rows, caches and choices are ours (`continuous`), so that a row's draw needs one uniform number of its own
stream and never depends on its neighbours.

Owns: loading, scoring, new weights. Refuses: weights that are not the model's. Caches live as long as one call, so that new weights find none.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from megatron_prism.errors import UserError
from megatron_prism.generate import chunks
from megatron_prism.generate.continuous import Decoder, Row
from megatron_prism.generate.interface import Generator, NamedTensors, OnDone, OnTooLong, Request, Sampling, Scored
from megatron_prism.generate.room import Fitted, cache_bytes_per_token, fit, fit_pairs, rows_in_memory
from megatron_prism.generate.settings import BackendConfig
from megatron_prism.generate.text import Speller, end_of_sequence_ids
from megatron_prism.generate.turns import Turns

SCORED_LOGITS = 2**28
"""Logits held at once while scoring: 1 GiB in fp32"""
OLD_NAMES = (r"^backbone\.", "model.")
"""Nemotron-H's files say backbone where transformers' model says model"""
KEPT_FP32 = (".A_log", ".D", ".dt_bias")
"""A Mamba mixer's weights that stay fp32 in a bf16 trainer. transformers loads them in the type of the rest; given in fp32, they are held so"""


class TransformersGenerator(Generator):
    """A Hugging Face folder as a `Generator`.

    model, tokenizer: as transformers loads them (`load`, `open`). batch_size: rows at a time. eos_ids: tokens that end a sequence.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int = 32,
        eos_ids: Sequence[int] | None = None,
        on_too_long: OnTooLong = "refuse",
        max_model_len: int | None = None,
    ):
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        self.speller = Speller(tokenizer, _eos_of_model(model, tokenizer) if eos_ids is None else eos_ids)
        self.device, self.turns = model.device, Turns()
        self.on_too_long: OnTooLong = on_too_long
        limits = [limit for limit in (getattr(model.config, "max_position_embeddings", None), max_model_len) if limit is not None]
        self.positions = min(limits, default=None)
        self.longest_pair = None if self.positions is None else self.positions + 1  # the last token is judged, not read

    @classmethod
    def load(cls, folder: Path, device: str = "cpu", dtype: str = "float32", batch_size: int = 32) -> "TransformersGenerator":
        """Load model and tokenizer from a local Hugging Face folder."""
        return cls.open(folder, BackendConfig.model_validate({"device": device, "dtype": dtype, "batch_size": batch_size}))

    @classmethod
    def open(cls, folder: Path, config: BackendConfig) -> "TransformersGenerator":
        """As the settings say."""
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = _read_model(folder, config.dtype).to(_device(config.device))
        eos_ids = end_of_sequence_ids(folder, tokenizer)
        return cls(model, tokenizer, config.batch_size, eos_ids, config.on_too_long, config.max_model_len)

    def generate_requests(self, requests: Sequence[Request], sampling: Sampling, on_done: OnDone) -> None:
        """See `interface.Generator`."""
        fitted = fit(requests, sampling, self.positions, self.on_too_long)
        speller, stop = self.speller, sampling.stop

        def finish(row: Row) -> None:
            completion = speller.completion(row.fitted, row.tokens, row.logprobs, stop)
            on_done(row.fitted.request, replace(completion, weights_version=version))

        pad_id = self.tokenizer.pad_token_id
        filler = pad_id if pad_id is not None else next(iter(speller.eos_ids), 0)
        decoder = Decoder(self.model, sampling, self._rows(fitted), filler, lambda row: speller.has_ended(row.fitted.prompt, row.tokens, stop))
        with self.turns.writing() as version:
            decoder.run(fitted, finish)

    def _rows(self, fitted: Sequence[Fitted]) -> int:
        """Rows at a time: batch_size, or as many long ones as a GPU's free memory holds."""
        if self.model.device.type != "cuda":
            return self.batch_size
        free_bytes, _ = torch.cuda.mem_get_info(self.model.device)
        return min(self.batch_size, rows_in_memory(fitted, cache_bytes_per_token(self.model.config, self.model.dtype.itemsize), free_bytes))

    @torch.inference_mode()
    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Scored]:
        """See `interface.Generator`. Rows of similar length together, padded on the right, where causal models do not look; long ones in chunks."""
        fitted = fit_pairs(pairs, self.longest_pair, self.on_too_long)
        with self.turns.writing():
            return self._score_all(fitted)

    def _score_all(self, fitted: list[tuple[list[int], list[int]]]) -> list[Scored]:
        order = sorted(range(len(fitted)), key=lambda place: -sum(map(len, fitted[place])))
        scored: dict[int, Scored] = {}
        while order:
            width = sum(map(len, fitted[order[0]]))
            if width > chunks.CHUNK_TOKENS:
                longest = order.pop(0)
                scored[longest] = self._score_long(*fitted[longest])
                continue
            count = max(1, min(self.batch_size, SCORED_LOGITS // (width * self.model.config.vocab_size)))
            batch, order = order[:count], order[count:]
            scored.update(zip(batch, self._score_batch([fitted[place] for place in batch], width), strict=True))
        return [scored[place] for place in range(len(fitted))]

    def _score_batch(self, pairs: list[tuple[list[int], list[int]]], width: int) -> Iterator[Scored]:
        rows = [[*prompt, *continuation][:-1] for prompt, continuation in pairs]
        ids = torch.tensor([row + [0] * (max(width - 1, 1) - len(row)) for row in rows], device=self.model.device)
        logits = self.model(input_ids=ids, use_cache=False).logits
        for (prompt, continuation), row in zip(pairs, logits, strict=True):
            yield _scored(row[len(prompt) - 1 : len(prompt) - 1 + len(continuation)], continuation)

    def _score_long(self, prompt: list[int], continuation: list[int]) -> Scored:
        text, first, found = [*prompt, *continuation], len(prompt) - 1, Scored((), True)
        for part, logits in chunks.logits_of(self.model, text[:-1]):
            begin = max(part.start, first)
            judged = _scored(logits[begin - part.start :], text[begin + 1 : part.stop + 1])
            found = Scored(found.logprobs + judged.logprobs, found.greedy and judged.greedy)
        return found

    @property
    def weights_version(self) -> int:
        """See `interface.Generator`."""
        return self.turns.version

    def update_weights(self, tensors: NamedTensors, version: int | None = None) -> None:
        """See `interface.Generator`. One tensor at a time; a generator that sleeps takes them too."""
        with self.turns.replacing(version):
            self._fill(tensors)

    @torch.no_grad()
    def _fill(self, tensors: NamedTensors) -> None:
        own = self.model.state_dict(keep_vars=True)
        filled: set[int] = set()
        for name, tensor in tensors:
            place = own.get(name, own.get(re.sub(*OLD_NAMES, name)))
            if place is None:
                raise UserError(f"the model has no weight named {name!r}; update_weights takes Hugging Face names")
            if place.shape != tensor.shape:
                raise UserError(f"weight {name} has shape {tuple(place.shape)} in the model, not {tuple(tensor.shape)}")
            if tensor.dtype == torch.float32 and name.endswith(KEPT_FP32):
                place.data = place.data.float()
            place.copy_(tensor)
            filled.add(place.data_ptr())
        missing = [name for name, tensor in own.items() if tensor.data_ptr() not in filled]  # tied weights are filled through either name
        if missing:
            raise UserError(f"update_weights was not given {len(missing)} of the model's {len(own)} weights, such as {missing[0]}")

    def reload(self, folder: Path) -> None:
        """See `interface.Generator`."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        self.update_weights(_read_model(folder, dtype).state_dict().items())

    def held_weights(self) -> dict[str, Tensor]:
        """The model's weights by the names of their files, to be compared (`digests.differing`); tied ones under each of their names."""
        own = self.model.state_dict()
        return own | {re.sub(r"^model\.", "backbone.", name): tensor for name, tensor in own.items()}

    def sleep(self) -> None:
        """See `interface.Generator`."""
        self._move("cpu", asleep=True)

    def wake(self) -> None:
        """See `interface.Generator`."""
        self._move(self.device, asleep=False)

    def _move(self, device: Any, asleep: bool) -> None:
        with self.turns.falling_asleep(asleep) as needed:
            if needed:
                self.model.to(device)
            if needed and self.device.type == "cuda":
                torch.cuda.empty_cache()

    def close(self) -> None:
        """See `interface.Generator`."""
        self.model = None


def _scored(logits_cv: Tensor, tokens: Sequence[int]) -> Scored:
    """Each token under the logits of its place."""
    table_cv = logits_cv.float().log_softmax(-1)
    ids_c = torch.tensor(tokens, dtype=torch.long, device=table_cv.device)
    return Scored(tuple(table_cv.gather(-1, ids_c[:, None])[:, 0].tolist()), bool((table_cv.argmax(-1) == ids_c).all()))


def _read_model(folder: Path, dtype: str) -> Any:
    with _no_progress_bars():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True, trust_remote_code=False)


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch finds no CUDA device here; set device=cpu")
    return name


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Inside, transformers draws no bars of its own across the caller's."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _eos_of_model(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends a sequence: the generation config's (it may name several) and the tokenizer's."""
    named = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = named if isinstance(named, list) else [named]
    return sorted({token for token in [*listed, tokenizer.eos_token_id] if token is not None})
