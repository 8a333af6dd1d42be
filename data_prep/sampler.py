"""Which tokens are sample i of a blend: a pure function of (document lengths, weights, names, seed, seq_len, i).

A source is an endless stream of tokens, epoch after epoch; in every epoch its documents stand in a fresh order drawn from (seed, name, epoch).
Sample k of a source is the tokens [k * seq_len, (k + 1) * seq_len + 1) of that stream: it crosses documents and epochs, and its last token is the
first of the next sample (inputs and shifted targets). The n-th sample of source j is due at time (n + 1/2) / w_j, with the weights summing to 1,
and the blend serves samples in order of due time. So the first n samples never depend on how many are asked for, any index can be had at once,
and the share of every source is exact to about one sample.

Owns: the order of samples. Refuses: sources without tokens, weights that are not positive. Knows nothing of steps, ranks, layouts or files.
"""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_prism.errors import UserError

Int64 = NDArray[np.int64]

EPOCHS_KEPT_PER_SOURCE = 2
"""A sample touches the current epoch and perhaps the next; older ones are drawn again when asked for."""
SCHEDULE_BLOCK = 4096
"""Indices whose sources are worked out together."""
SCHEDULE_BLOCKS_KEPT = 8


class Span(NamedTuple):
    """A run of tokens inside one document."""

    document: int
    offset: int
    length: int


class Sample(NamedTuple):
    """Where the seq_len + 1 tokens of one sample lie."""

    source: int
    spans: list[Span]


class _Epoch(NamedTuple):
    """One pass over a source: its documents in this epoch's order, and the token at which each of them ends."""

    order: NDArray[np.integer[Any]]
    ends: Int64


class Sampler:
    """The endless sample stream of a blend.

    document_lengths: tokens per document, one array per source, over all its shards in order. weights: any positive numbers, one per source.
    seq_len: tokens that a sample advances; it holds one more. names: what each source's order is drawn from (default: its position), so that a
    source keeps its order when others join or leave the blend. Memory: about 20 bytes per document for each epoch in use.
    Errors: UserError for bad weights, names, or a source without tokens. Any rank may hold one; all hold the same.
    """

    def __init__(
        self, document_lengths: Sequence[NDArray[Any]], weights: Sequence[float], seq_len: int, seed: int, names: Sequence[str] | None = None
    ):
        self.names = list(names) if names is not None else [str(position) for position in range(len(weights))]
        self.seq_len, self.seed = int(seq_len), int(seed)
        self._lengths = [np.asarray(lengths) for lengths in document_lengths]
        self._totals = [int(lengths.sum(dtype=np.int64)) for lengths in self._lengths]
        self._check(weights)
        total = math.fsum(float(weight) for weight in weights)
        self.weights = np.array([float(weight) / total for weight in weights])
        self._epochs: list[OrderedDict[int, _Epoch]] = [OrderedDict() for _ in self._lengths]
        self._blocks: OrderedDict[int, tuple[Int64, Int64]] = OrderedDict()

    def _check(self, weights: Sequence[float]) -> None:
        if self.seq_len < 1 or self.seed < 0:
            raise UserError(f"seq_len={self.seq_len} must be at least 1 and seed={self.seed} at least 0")
        if not self._lengths or not len(self._lengths) == len(weights) == len(self.names):
            raise UserError(
                f"a blend needs one weight and one name per source; got {len(self._lengths)} sources, {len(weights)} weights, {self.names}"
            )
        if len(set(self.names)) < len(self.names):
            raise UserError(f"source names must differ, else their orders would be the same; got {self.names}")
        for name, weight, tokens in zip(self.names, weights, self._totals, strict=True):
            if not (math.isfinite(weight) and weight > 0):
                raise UserError(f"the weight of source {name!r} is {weight}, it must be a positive number; leave the source out to switch it off")
            if tokens == 0:
                raise UserError(f"source {name!r} has no tokens; leave it out of the blend or prepare more text")

    def sample(self, index: int) -> Sample:
        """Sample `index` (from 0) of the blend."""
        sources, ordinals = self._block(index // SCHEDULE_BLOCK)
        place = index % SCHEDULE_BLOCK
        source = int(sources[place])
        return Sample(source, self.spans(source, int(ordinals[place])))

    def counts(self, num_samples: int) -> Int64:
        """How many of the first `num_samples` samples come from each source: exact, shape [sources], in the time of one window."""
        before, due_at, source_of = self._window(num_samples, num_samples)
        taken = source_of[np.lexsort((source_of, due_at))][: num_samples - int(before.sum())]
        return before + np.bincount(taken, minlength=len(before))

    def schedule(self, start: int, stop: int) -> tuple[Int64, Int64]:
        """Which source serves the samples [start, stop), and which sample of that source each is: two arrays of stop - start."""
        assert 0 <= start <= stop, (start, stop)
        before, due_at, source_of = self._window(start, stop)
        # Within a source the window holds consecutive samples in order, so a sample's ordinal is `before` plus its rank among its source's.
        first = np.concatenate([[0], np.cumsum(np.bincount(source_of, minlength=len(before)))[:-1]])
        ordinal_of = np.arange(len(source_of)) - first[source_of] + before[source_of]
        chosen = np.lexsort((source_of, due_at))[start - int(before.sum()) :][: stop - start]
        return source_of[chosen], ordinal_of[chosen]

    def spans(self, source: int, ordinal: int) -> list[Span]:
        """Where the tokens of sample `ordinal` of one source lie; the lengths sum to seq_len + 1."""
        epoch, offset = divmod(ordinal * self.seq_len, self._totals[source])
        wanted, spans = self.seq_len + 1, []
        while wanted:
            part = self._spans_in_epoch(source, epoch, offset, wanted)
            wanted -= sum(span.length for span in part)
            spans += part
            epoch, offset = epoch + 1, 0
        return spans

    def _spans_in_epoch(self, source: int, epoch: int, start: int, wanted: int) -> list[Span]:
        order, ends = self._epoch(source, epoch)
        stop = min(start + wanted, self._totals[source])
        # First and last document that hold a token of [start, stop); side="right" steps over documents without tokens.
        first, last = (int(place) for place in np.searchsorted(ends, [start, stop - 1], side="right"))
        uppers = np.minimum(ends[first : last + 1], stop)
        lowers = np.concatenate([[start], uppers[:-1]])
        documents = order[first : last + 1]
        offsets = np.zeros(len(documents), dtype=np.int64)
        offsets[0] = start - (ends[first] - self._lengths[source][documents[0]])
        rows = zip(documents.tolist(), offsets.tolist(), (uppers - lowers).tolist(), strict=True)
        return [Span(*row) for row in rows if row[2]]

    def _epoch(self, source: int, epoch: int) -> _Epoch:
        kept = self._epochs[source]
        if epoch not in kept:
            order = document_order(len(self._lengths[source]), self.seed, self.names[source], epoch)
            kept[epoch] = _Epoch(order, np.cumsum(self._lengths[source][order], dtype=np.int64))
            if len(kept) > EPOCHS_KEPT_PER_SOURCE:
                kept.popitem(last=False)
        kept.move_to_end(epoch)
        return kept[epoch]

    def _block(self, block: int) -> tuple[Int64, Int64]:
        if block not in self._blocks:
            self._blocks[block] = self.schedule(block * SCHEDULE_BLOCK, (block + 1) * SCHEDULE_BLOCK)
            if len(self._blocks) > SCHEDULE_BLOCKS_KEPT:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(block)
        return self._blocks[block]

    def _window(self, start: int, stop: int) -> tuple[Int64, NDArray[np.float64], Int64]:
        """All samples due in a span of time that surely holds those served as [start, stop).

        By time t source j has served w_j * t samples to within 1/2, so the blend has served t to within half the number of sources.
        Returns the samples of each source before the span; the due times in it, source by source; the source of each.
        """
        slack = len(self.weights) / 2 + 2
        before, until = self._due_by(start - slack), self._due_by(stop + slack)
        assert before.sum() <= start and until.sum() >= stop, (start, stop)
        source_of = np.repeat(np.arange(len(self.weights)), until - before)
        first = np.concatenate([[0], np.cumsum(until - before)[:-1]])
        ordinals = np.arange(len(source_of)) - first[source_of] + before[source_of]
        return before, self._due_time(ordinals, self.weights[source_of]), source_of

    @staticmethod
    def _due_time(ordinals: Int64, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return (ordinals + 0.5) / weights

    def _due_by(self, time: float) -> Int64:
        """Samples of each source with a due time <= time. The order is that of the rounded due times, so the count is corrected by them."""
        counts = np.maximum(np.floor(time * self.weights + 0.5), 0).astype(np.int64)
        while (late := (counts > 0) & (self._due_time(counts - 1, self.weights) > time)).any():
            counts -= late
        while (early := self._due_time(counts, self.weights) <= time).any():
            counts += early
        return counts


def document_order(num_documents: int, seed: int, name: str, epoch: int) -> NDArray[np.integer[Any]]:
    """The order of a source's documents in one epoch: a permutation of range(num_documents).

    Sorts the raw 64-bit stream of Philox, which numpy keeps the same on every platform and version (Generator.permutation it may change).
    """
    digest = hashlib.sha256(f"{seed}\0{epoch}\0{name}".encode()).digest()
    keys = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(num_documents)
    order = np.argsort(keys)
    ordered = keys[order]
    if (ordered[1:] == ordered[:-1]).any():  # equal keys are as good as never drawn; how the quick sort leaves them depends on the processor
        order = np.argsort(keys, kind="stable")
    return order.astype(np.uint32) if num_documents <= 1 << 32 else order
