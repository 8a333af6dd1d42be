"""Continuous batching over a transformers model: a row that has ended leaves the batch, and waiting requests take its place.

transformers' own continuous batching knows attention only (no state-space layers) and draws from one stream of random numbers; this loop takes every
model whose cache is made of keys and values (whole or of a sliding window) and of recurrent states, and each row draws from a stream of its own.

Rows stand right-aligned in the cache: columns on the left that a row does not use are masked. New requests are read in a batch of their own, and
the two caches are joined, the narrower one padded on the left; keys carry their rotary positions, so that moving a column changes nothing.
A prompt longer than a chunk (`chunks`) is read alone, a chunk at a time, so that its length costs memory for its cache only.

Legend: b rows of the batch, w columns of the cache, v vocabulary. Owns: rows, caches, choosing. Refuses: caches of other kinds.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_prism.generate import chunks
from megatron_prism.generate.interface import Sampling
from megatron_prism.generate.room import Fitted


@dataclass
class Row:
    """A request at work."""

    fitted: Fitted
    stream: np.random.Generator
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens that stand in the cache: the prompt and all but the last drawn token."""
        return len(self.fitted.prompt) + len(self.tokens) - 1


@dataclass
class Batch:
    """Rows that are decoded together, with their cache and its mask [b, w]."""

    rows: list[Row]
    cache: Any
    mask_bw: Tensor


class Decoder:
    """Runs requests through one model. ended: whether a row's last token was its last."""

    def __init__(self, model: Any, sampling: Sampling, batch_size: int, pad_id: int, ended: Callable[[Row], bool]):
        self.model, self.sampling, self.batch_size, self.pad_id, self.ended = model, sampling, batch_size, pad_id, ended
        known = signature(model.forward).parameters
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self.takes_positions = "position_ids" in known

    @torch.inference_mode()
    def run(self, requests: Sequence[Fitted], on_row: Callable[[Row], None]) -> None:
        """Complete every request; on_row is called with each row as it ends."""
        waiting = deque(sorted(requests, key=lambda fitted: len(fitted.prompt)))
        batch: Batch | None = None
        while waiting or batch is not None:
            free = self.batch_size - (len(batch.rows) if batch is not None else 0)
            if waiting and (batch is None or free >= max(1, self.batch_size // 8)):  # reading one request at a time would stall the others
                new = self._leave(self._read(_next(waiting, free)), on_row)
                batch = _join(batch, new) if batch is not None and new is not None else batch or new
            elif batch is not None:
                self._step(batch)
                batch = self._leave(batch, on_row)

    def _read(self, requests: list[Fitted]) -> Batch:
        """A batch of new rows: their prompts are in the cache, their first tokens are drawn."""
        width = max(len(fitted.prompt) for fitted in requests)
        padded = [[self.pad_id] * (width - len(fitted.prompt)) + list(fitted.prompt) for fitted in requests]
        mask = [[0] * (width - len(fitted.prompt)) + [1] * len(fitted.prompt) for fitted in requests]
        ids_bw, mask_bw = (torch.tensor(table, device=self.model.device) for table in (padded, mask))
        rows = [Row(fitted, self._stream(fitted)) for fitted in requests]
        batch = Batch(rows, None, mask_bw)
        positions_bw = (mask_bw.cumsum(-1) - 1).clamp(min=0)
        for part in chunks.chunks(width):
            logits_bv = self._forward(batch, ids_bw[:, part], positions_bw[:, part], mask_bw[:, : part.stop])
        self._write(rows, logits_bv)
        return batch

    def _step(self, batch: Batch) -> None:
        """One more token of every row."""
        batch.mask_bw = pad(batch.mask_bw, (0, 1), value=1)
        ids_b1 = torch.tensor([row.tokens[-1:] for row in batch.rows], device=self.model.device)
        positions_b1 = torch.tensor([[row.length] for row in batch.rows], device=self.model.device)
        self._write(batch.rows, self._forward(batch, ids_b1, positions_b1, batch.mask_bw))

    def _forward(self, batch: Batch, ids: Tensor, positions: Tensor, mask_bw: Tensor) -> Tensor:
        """Read tokens that follow those in the cache; returns the logits [b, v] after the last one."""
        where = {"position_ids": positions} if self.takes_positions else {}
        found = self.model(
            input_ids=ids, attention_mask=mask_bw, past_key_values=batch.cache, use_cache=True, **where, **self.last_only
        )  # fmt: skip
        batch.cache = found.past_key_values
        return found.logits[:, -1].float()

    def _write(self, rows: list[Row], logits_bv: Tensor) -> None:
        """Each row's next token."""
        chosen_b = self._choose(rows, logits_bv)
        logprob_b = torch.log_softmax(logits_bv, dim=-1).gather(-1, chosen_b[:, None])[:, 0]
        for row, token, logprob in zip(rows, chosen_b.tolist(), logprob_b.tolist(), strict=True):
            row.tokens.append(token)
            row.logprobs.append(logprob)

    def _choose(self, rows: list[Row], logits_bv: Tensor) -> Tensor:
        if self.sampling.temperature == 0:
            return logits_bv.argmax(dim=-1)
        uniform_b = torch.tensor([row.stream.random() for row in rows], dtype=torch.float64, device=logits_bv.device)
        return draw(logits_bv, self.sampling.temperature, self.sampling.top_p, uniform_b)

    def _stream(self, fitted: Fitted) -> np.random.Generator:
        """The row's own random numbers, one a token."""
        return np.random.default_rng((self.sampling.seed, fitted.request.place, fitted.request.sample))

    def _leave(self, batch: Batch, on_row: Callable[[Row], None]) -> Batch | None:
        """The rows that go on; the others are reported."""
        done = [len(row.tokens) >= row.fitted.max_new_tokens or self.ended(row) for row in batch.rows]
        for row, is_done in zip(batch.rows, done, strict=True):
            if is_done:
                on_row(row)
        kept = [place for place, is_done in enumerate(done) if not is_done]
        return batch if len(kept) == len(done) else _select(batch, kept) if kept else None


def _next(waiting: deque[Fitted], free: int) -> list[Fitted]:
    """The requests to read next, shortest first: as many as fit one chunk each, or one longer one."""
    found = [waiting.popleft()]
    while waiting and len(found) < free and len(waiting[0].prompt) <= chunks.CHUNK_TOKENS:
        found.append(waiting.popleft())
    return found


def draw(logits_bv: Tensor, temperature: float, top_p: float, uniform_b: Tensor) -> Tensor:
    """Tokens [b] drawn from softmax(logits / temperature) cut to its top_p set, by inverse CDF at `uniform_b` in [0, 1) (float64)."""
    probability_bv = torch.softmax(logits_bv.double() / temperature, dim=-1)
    if top_p == 1:  # in the order of the ids: sorting a vocabulary costs as much as a small model's layers
        cdf_bv = probability_bv.cumsum(dim=-1)
        return torch.searchsorted(cdf_bv, (uniform_b * cdf_bv[:, -1])[:, None], right=True)[:, 0].clamp(max=cdf_bv.shape[-1] - 1)
    probability_bv, token_bv = probability_bv.sort(dim=-1, descending=True, stable=True)
    cdf_bv = probability_bv.cumsum(dim=-1)
    kept_b = (cdf_bv - probability_bv < top_p).sum(dim=-1)  # a token stays while those before it have not reached top_p
    mass_b = cdf_bv.gather(-1, kept_b[:, None] - 1)[:, 0]
    place_b = torch.searchsorted(cdf_bv, (uniform_b * mass_b)[:, None], right=True)[:, 0]
    return token_bv.gather(-1, torch.minimum(place_b, kept_b - 1)[:, None])[:, 0]


def _select(batch: Batch, kept: list[int]) -> Batch:
    """These rows of the batch, without the columns that none of them uses."""
    batch.cache.reorder_cache(torch.tensor(kept, device=batch.mask_bw.device))
    mask_bw = batch.mask_bw[kept]
    unused = int(mask_bw.any(dim=0).int().argmax())
    for layer in batch.cache.layers if unused else ():
        _drop_columns(layer, unused)
    return Batch([batch.rows[place] for place in kept], batch.cache, mask_bw[:, unused:])


def _join(one: Batch, two: Batch) -> Batch:
    """One batch of both, in the cache of the first."""
    width = max(one.mask_bw.shape[1], two.mask_bw.shape[1])
    for layer, other in zip(one.cache.layers, two.cache.layers, strict=True):
        _join_layers(layer, other)
    masks = [pad(batch.mask_bw, (width - batch.mask_bw.shape[1], 0)) for batch in (one, two)]
    return Batch([*one.rows, *two.rows], one.cache, torch.cat(masks))


def _has_columns(layer: Any) -> bool:
    return getattr(layer, "keys", None) is not None


def _drop_columns(layer: Any, count: int) -> None:
    """Drop the cache's first columns; one of a sliding window holds its last columns only."""
    if not _has_columns(layer):
        return
    dropped = count
    if layer.is_sliding:
        layer.cumulative_length -= count
        dropped = max(0, layer.keys.shape[-2] - layer.cumulative_length)
    layer.keys, layer.values = layer.keys[..., dropped:, :], layer.values[..., dropped:, :]


def _join_layers(layer: Any, other: Any) -> None:
    """Append the rows of `other`: keys and values padded on the left to one width, states as they are."""
    if _has_columns(layer):
        width = max(layer.keys.shape[-2], other.keys.shape[-2])
        for name in ("keys", "values"):
            both = [pad(getattr(part, name), (0, 0, width - getattr(part, name).shape[-2], 0)) for part in (layer, other)]
            setattr(layer, name, torch.cat(both))
        if layer.is_sliding:
            layer.cumulative_length = max(layer.cumulative_length, other.cumulative_length)
    for name in ("conv_states", "recurrent_states"):
        states = getattr(layer, name, {})
        for index, state in states.items():
            if state is not None:
                states[index] = torch.cat([state, getattr(other, name)[index]])
