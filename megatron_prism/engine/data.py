"""Samples become micro-batches: which tokens each data-parallel rank sees at each step, read from the shards through megatron-core's IndexedDataset.

Sample i of a run is a function of the blend, the seed and i alone (`data_prep.sampler`). Step t takes samples t * global_batch to
(t + 1) * global_batch; micro-batch m of data-parallel rank r takes the (m * dp + r)-th group of micro_batch samples of these. All ranks with one
data-parallel rank read the same samples; nothing is broadcast. Context-parallel ranks each keep their part of every row (`context_parallel`), cut
when the sample and its labels are read. A background thread reads ahead of the step (`prefetch`): on a GPU the step finds its
micro-batches in pinned memory and only starts their copy. Packed documents are `packed_data`'s, on top of this.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_prism.data_prep import learnt
from megatron_prism.data_prep.answers import Bits
from megatron_prism.data_prep.blend import Blend, Loss
from megatron_prism.data_prep.history import from_records
from megatron_prism.data_prep.manifest import Manifest, ReadCheck, check_one_tokenizer, verify
from megatron_prism.data_prep.masks import MaskReader
from megatron_prism.data_prep.sampler import Sampler
from megatron_prism.engine.context_parallel import chunks
from megatron_prism.engine.device import CPU
from megatron_prism.engine.parallel import Mesh
from megatron_prism.engine.prefetch import Prefetcher

MICRO_BATCHES_AHEAD = 16
"""Read before they are needed, and so held in memory: 20 bytes a token each, 28 where documents are packed."""


@dataclass(frozen=True)
class MicroBatch:
    """tokens, labels, positions: int64 [b, s]; loss_mask: float32 [b, s], 1 where the token counts; sources: int64 [b], place in the blend."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    loss_mask: Tensor
    sources: Tensor

    @property
    def copied(self) -> tuple[str, ...]:
        """What differs from batch to batch, and is copied to the device with it."""
        return "tokens", "labels", "loss_mask", "sources"

    @property
    def packed_seq_params(self) -> PackedSeqParams | None:
        """Where documents end that see themselves alone; None: every row is one."""
        return None

    def row_lengths(self) -> tuple[int, ...]:
        """Tokens of what lies end to end in a row: one sequence."""
        return (self.tokens.shape[1],)

    def cut(self, cp: int, rank: int) -> Self:
        """What one of cp context-parallel ranks keeps of every row."""
        ranges = [slice(chunk.start, chunk.stop) for chunk in chunks(self.row_lengths(), cp, rank)]
        rows = ("tokens", "labels", "positions", "loss_mask")
        return replace(self, **{name: _joined(getattr(self, name).numpy(), ranges) for name in rows})

    def pinned(self) -> Self:
        """The same batch in memory that a GPU reads by itself, but for the positions, which `to` takes from the device."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in self.copied})

    def to(self, device: torch.device, positions: Tensor | None = None) -> Self:
        """The same batch on a device; the copies overlap with compute. positions: those that are on the device already."""
        if device.type == "cpu":
            return self
        moved = {name: getattr(self, name).pin_memory().to(device, non_blocking=True) for name in self.copied}
        if "positions" not in moved:
            moved["positions"] = self.positions.to(device) if positions is None else positions
        return replace(self, **moved)


def _joined(rows: np.ndarray[Any, Any], ranges: list[slice]) -> Tensor:
    return torch.from_numpy(np.concatenate([rows[:, columns] for columns in ranges], axis=1))


class SourceReader:
    """Tokens of one source's documents, counted through its shards; each block of a shard is checked against its checksum when first read.

    answers: whether the loss counts answers alone.
    """

    def __init__(self, manifest: Manifest, answers: bool = False) -> None:
        self.shards = [IndexedDataset(str(prefix)) for prefix in manifest.prefixes]
        self.first_document = np.cumsum([0] + [shard.documents for shard in manifest.shards])
        self.checks = ReadCheck(manifest)
        self.masks = MaskReader(manifest) if answers else None

    def read(self, document: int, offset: int, length: int) -> np.ndarray[Any, Any]:
        """`length` tokens of a document from `offset`."""
        shard, place = self._find(document)
        dataset = self.shards[shard]
        start = int(dataset.index.sequence_pointers[place]) + offset * dataset.index.dtype_size
        self.checks.check(shard, start, start + length * dataset.index.dtype_size)
        tokens: np.ndarray[Any, Any] = dataset.get(place, offset=offset, length=length)
        return tokens

    def answers(self, document: int, offset: int, length: int) -> Bits:
        """Which of these tokens are answers."""
        assert self.masks is not None
        shard, place = self._find(document)
        index = self.shards[shard].index
        return self.masks.read(shard, int(index.sequence_pointers[place]) // index.dtype_size + offset, length)

    def _find(self, document: int) -> tuple[int, int]:
        """The shard of a document, and its place there."""
        shard = int(np.searchsorted(self.first_document, document, side="right")) - 1
        return shard, int(document - self.first_document[shard])


class SampleReader:
    """One split of a blend as an endless, random-access list of samples of seq_len + 1 tokens.

    loss: which tokens count where the blend does not say it for a source. Errors: UserError, also where answers are not known.
    """

    def __init__(self, blend: Blend, split: str, seq_len: int, mask_end_of_document: bool, loss: Loss = "all") -> None:
        chosen = [source for source in blend.sources if getattr(source, split) is not None]
        self.names = [source.name for source in chosen]
        self.domains = [source.domain for source in chosen]
        manifests = [verify(getattr(source, split)) for source in chosen]
        check_one_tokenizer(manifests)
        learnt.check(chosen, manifests, loss)
        self.readers = [SourceReader(manifest, learnt.answers_alone(source, loss)) for source, manifest in zip(chosen, manifests, strict=True)]
        self.loss_line = learnt.describe(chosen, manifests, loss)
        """what of the sources counts in the loss, for people; None: all tokens"""
        self.lengths = [manifest.document_lengths() for manifest in manifests]
        self.sampler = Sampler(self.lengths, [source.weight for source in chosen], seq_len, blend.seed, names=self.names)
        self.seq_len = seq_len
        self.end_of_document = manifests[0].end_of_document
        self.masked_token = self.end_of_document if mask_end_of_document else None
        self.fingerprint: dict[str, Any] = {
            "seed": blend.seed,
            "seq_len": seq_len,
            "mask_end_of_document": mask_end_of_document,
            "packing": None,
            "sources": learnt.records(chosen, manifests, loss),
        }
        self.vocab_size = manifests[0].vocab_size
        self._sampling = threading.Lock()  # the sampler's caches are not made for two threads
        self._positions: dict[tuple[Any, ...], Tensor] = {}
        self._ahead: Prefetcher[MicroBatch] | None = None
        self._ahead_of: tuple[Any, ...] | None = None
        self._waited_seconds = 0.0

    def follow(self, records: list[dict[str, Any]]) -> None:
        """Serve the samples of a run's recorded plans (`data_prep.history`), of which the last is this blend's, from the next step on."""
        self.close()  # what is read ahead may be of other plans
        self.sampler.follow(from_records(records))
        self.fingerprint["history"] = records

    def documents(self, index: int) -> tuple[str, list[int]]:
        """The source of a sample, and its documents there."""
        with self._sampling:
            sample = self.sampler.sample(index)
        return self.names[sample.source], list(dict.fromkeys(span.document for span in sample.spans))

    def tokens(self, index: int) -> tuple[np.ndarray[Any, Any], int]:
        """The seq_len + 1 tokens of a sample, int64, and its place in the blend."""
        row = np.empty(self.seq_len + 1, np.int64)
        return row, self._read_into(row, None, index)

    def micro_batch(self, indices: range) -> MicroBatch:
        """The samples of one micro-batch. Any thread may call it: numpy alone, so that it takes no cores from torch's own threads."""
        window = np.empty((len(indices), self.seq_len + 1), np.int64)
        counts = np.ones(window.shape, np.float32)
        sources = np.array([self._read_into(*rows) for rows in zip(window, counts, indices, strict=True)])
        tokens, labels, mask = (np.ascontiguousarray(part) for part in (window[:, :-1], window[:, 1:], counts[:, 1:]))
        if self.masked_token is not None:
            mask[tokens == self.masked_token] = 0
        tokens_bs, labels_bs, mask_bs, sources_b = (torch.from_numpy(array) for array in (tokens, labels, mask, sources))
        return MicroBatch(tokens_bs, labels_bs, self.positions(len(indices), CPU), mask_bs, sources_b)

    def step(self, first_sample: int, mesh: Mesh, device: torch.device) -> Iterator[MicroBatch]:
        """This data-parallel rank's micro-batches of the global batch that starts at `first_sample`; those of later batches are read meanwhile.

        Errors: those of reading, at the micro-batch that they belong to.
        """
        plan = mesh.plan
        stride = plan.dp * plan.micro_batch
        ahead = self._reading_ahead(stride, mesh, device)
        start = first_sample + mesh.dp_rank * plan.micro_batch
        for place in range(start, start + plan.num_microbatches * stride, stride):
            yield ahead.get(place).to(device, self.positions(plan.micro_batch, device, plan.cp, mesh.cp_rank))

    def positions(self, rows: int, device: torch.device, cp: int = 1, cp_rank: int = 0) -> Tensor:
        """0 to seq_len - 1 in each row, or this context-parallel rank's of them, int64 [rows, s / cp]; the same tensor at every call."""
        key = rows, device, cp, cp_rank
        if key not in self._positions:  # not expanded: overlapping memory cannot be pinned
            row = [torch.arange(chunk.start, chunk.stop, device=device) for chunk in chunks((self.seq_len,), cp, cp_rank)]
            self._positions[key] = torch.cat(row).repeat(rows, 1)
        return self._positions[key]

    @property
    def waited_seconds(self) -> float:
        """How long steps have waited for samples, in all."""
        return self._waited_seconds + (self._ahead.waited_seconds if self._ahead else 0.0)

    def close(self) -> None:
        """End the background thread. A later step starts another."""
        if self._ahead is not None:
            self._ahead.close()
            self._waited_seconds += self._ahead.waited_seconds
        self._ahead = self._ahead_of = None

    def _read_into(self, row: np.ndarray[Any, Any], counts: np.ndarray[Any, Any] | None, index: int) -> int:
        """Fill a row with the tokens of a sample, and one of ones with whether each is to be learnt; its source's place in the blend."""
        with self._sampling:
            sample = self.sampler.sample(index)
        filled, reader = 0, self.readers[sample.source]
        for span in sample.spans:
            row[filled : filled + span.length] = reader.read(span.document, span.offset, span.length)
            if counts is not None and reader.masks is not None:
                counts[filled : filled + span.length] = reader.answers(span.document, span.offset, span.length)
            filled += span.length
        return sample.source

    def _reading_ahead(self, stride: int, mesh: Mesh, device: torch.device) -> Prefetcher[MicroBatch]:
        """The thread that reads micro-batches `stride` samples apart; another layout gets another."""
        wanted = stride, mesh.plan.micro_batch, mesh.plan.cp, mesh.cp_rank, device
        if self._ahead is None or self._ahead_of != wanted:
            self.close()
            on_gpu = device.type == "cuda"
            # a new thread stands on the first GPU, where pinning would open a context of its own
            on_start = partial(torch.cuda.set_device, torch.cuda.current_device()) if on_gpu else None
            self._ahead = Prefetcher(partial(self._prepare, mesh, on_gpu), stride, MICRO_BATCHES_AHEAD, on_start)
            self._ahead_of = wanted
        return self._ahead

    def _prepare(self, mesh: Mesh, pin: bool, start: int) -> MicroBatch:
        plan = mesh.plan
        batch = self.micro_batch(range(start, start + plan.micro_batch))
        batch = batch.cut(plan.cp, mesh.cp_rank) if plan.cp > 1 else batch
        return batch.pinned() if pin else batch
