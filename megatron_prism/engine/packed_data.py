"""Packed micro-batches: one buffer of whole documents each, with where they end. See `data_prep.packing` and `data_prep.packed_sampler`.

Owns: `open_reader`, which gives a recipe's samples, packed or not. Refuses more than one buffer in a micro-batch: documents in a row of their own
without a batch axis are all that the packed (thd) layers take, and a larger micro-batch would be a larger seq_len.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_prism.data_prep import packing
from megatron_prism.data_prep.blend import Blend, Loss
from megatron_prism.data_prep.packed_sampler import PackedSampler
from megatron_prism.engine.data import MicroBatch, SampleReader
from megatron_prism.engine.documents import Documents, documents
from megatron_prism.engine.recipe_blocks import DataSection, PackingSection


@dataclass(frozen=True)
class PackedBatch(MicroBatch):
    """One buffer. cu_seqlens: int32 [documents + 1], where they end, padding included, from 0; lengths: theirs, on the host.

    Both are those of the whole buffer also where a context-parallel rank holds a part of it.
    positions count from each document's start; loss_mask is 0 on padding and on a document's last token, which nothing follows.
    """

    cu_seqlens: Tensor
    lengths: tuple[int, ...]

    @property
    def copied(self) -> tuple[str, ...]:
        """Positions too: they differ."""
        return *super().copied, "positions", "cu_seqlens"

    def row_lengths(self) -> tuple[int, ...]:
        """Those of its documents: each is cut by itself."""
        return self.lengths

    @cached_property
    def packed_seq_params(self) -> Documents:
        """Made once for all layers and chunks."""
        return documents(self.cu_seqlens, self.lengths)


class PackedReader(SampleReader):
    """One split of a blend as an endless, random-access list of buffers. Errors: UserError, by source, for documents that are too long."""

    def __init__(self, blend: Blend, split: str, seq_len: int, mask_end_of_document: bool, section: PackingSection, loss: Loss = "all") -> None:
        super().__init__(blend, split, seq_len, mask_end_of_document, loss)
        self.options = section.options(seq_len)
        self.packed = PackedSampler(self.sampler, self.lengths, self.options, section.window_documents, blend.seed)
        self.fingerprint["packing"] = section.model_dump(mode="json")
        for record, source in zip(self.fingerprint["sources"], self.packed.sources, strict=True):
            record["buffers"] = source.buffers_in_epoch if source.is_soon_counted else None

    def documents(self, index: int) -> tuple[str, list[int]]:
        """The source of a buffer, and its documents there."""
        with self._sampling:
            source, spans = self.packed.sample(index)
        return self.names[source], list(dict.fromkeys(span.document for span in spans))

    def tokens(self, index: int) -> tuple[np.ndarray[Any, Any], int]:
        """The seq_len + 1 tokens of a buffer and its last label, int64, and its place in the blend."""
        batch = self.micro_batch(range(index, index + 1))
        return torch.cat([batch.tokens[0], batch.labels[0, -1:]]).numpy(), int(batch.sources[0])

    def micro_batch(self, indices: range) -> PackedBatch:
        """One buffer. Any thread may call it."""
        assert len(indices) == 1, f"a packed micro-batch is one buffer, asked for {len(indices)}"
        with self._sampling:
            source, spans = self.packed.sample(indices[0])
        reader = self.readers[source]
        tokens, labels = packing.tokens_and_labels(spans, self.options, reader.read, self.end_of_document)
        mask = packing.loss_mask(spans, self.options, reader.answers if reader.masks is not None else None, count_repeated=False)
        if self.masked_token is not None:
            mask *= tokens != self.masked_token
        ends = packing.cu_seqlens(spans, self.options)
        rows = (tokens, labels, packing.position_ids(spans, self.options), mask)
        tokens_bs, labels_bs, positions_bs, mask_bs = (torch.from_numpy(row).unsqueeze(0) for row in rows)
        lengths = tuple(np.diff(ends).tolist())
        return PackedBatch(tokens_bs, labels_bs, positions_bs, mask_bs, torch.tensor([source]), torch.from_numpy(ends), lengths)

    def describe(self) -> str:
        """How full the buffers are, by each source's first window, in one line."""
        with self._sampling:
            fills = {name: source.packing(0).fill for name, source in zip(self.names, self.packed.sources, strict=True)}
        shown = ", ".join(f"{name} {fill:.2%}" for name, fill in fills.items())
        return f"packed documents: of the places in a buffer these hold a token: {shown} (each source's first window)"


def open_reader(blend: Blend, split: str, data: DataSection) -> SampleReader:
    """A split of a blend as the recipe wants it read. Errors: UserError."""
    if data.packing is None:
        return SampleReader(blend, split, data.seq_len, data.mask_end_of_document, data.loss)
    return PackedReader(blend, split, data.seq_len, data.mask_end_of_document, data.packing, data.loss)
