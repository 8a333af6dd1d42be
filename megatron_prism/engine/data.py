"""Samples become micro-batches: which tokens each data-parallel rank sees at each step, read from the shards through megatron-core's IndexedDataset.

Sample i of a run is a function of the blend, the seed and i alone (`data_prep.sampler`). Step t takes samples t * global_batch to
(t + 1) * global_batch; micro-batch m of data-parallel rank r takes the (m * dp + r)-th group of micro_batch samples of these. All ranks with one
data-parallel rank read the same samples; nothing is broadcast.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor

from megatron_prism.data_prep.blend import Blend
from megatron_prism.data_prep.manifest import Manifest, ReadCheck, check_one_tokenizer, verify
from megatron_prism.data_prep.sampler import Sampler
from megatron_prism.engine.parallel import Mesh


@dataclass(frozen=True)
class MicroBatch:
    """tokens, labels, positions: int64 [b, s]; loss_mask: float32 [b, s], 1 where the token counts; sources: int64 [b], place in the blend."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    loss_mask: Tensor
    sources: Tensor

    def to(self, device: torch.device) -> "MicroBatch":
        """The same batch on a device; the copy overlaps with compute."""
        if device.type == "cpu":
            return self
        names = ("tokens", "labels", "positions", "loss_mask", "sources")
        return MicroBatch(**{name: getattr(self, name).pin_memory().to(device, non_blocking=True) for name in names})


class SourceReader:
    """Tokens of one source's documents, counted through its shards; each block of a shard is checked against its checksum when first read."""

    def __init__(self, manifest: Manifest) -> None:
        self.shards = [IndexedDataset(str(prefix)) for prefix in manifest.prefixes]
        self.first_document = np.cumsum([0] + [shard.documents for shard in manifest.shards])
        self.checks = ReadCheck(manifest)

    def read(self, document: int, offset: int, length: int) -> np.ndarray[Any, Any]:
        """`length` tokens of a document from `offset`."""
        shard = int(np.searchsorted(self.first_document, document, side="right")) - 1
        dataset, place = self.shards[shard], int(document - self.first_document[shard])
        start = int(dataset.index.sequence_pointers[place]) + offset * dataset.index.dtype_size
        self.checks.check(shard, start, start + length * dataset.index.dtype_size)
        tokens: np.ndarray[Any, Any] = dataset.get(place, offset=offset, length=length)
        return tokens


class SampleReader:
    """One split of a blend as an endless, random-access list of samples of seq_len + 1 tokens."""

    def __init__(self, blend: Blend, split: str, seq_len: int, mask_end_of_document: bool) -> None:
        chosen = [source for source in blend.sources if getattr(source, split) is not None]
        self.names = [source.name for source in chosen]
        self.domains = [source.domain for source in chosen]
        manifests = [verify(getattr(source, split)) for source in chosen]
        check_one_tokenizer(manifests)
        self.readers = [SourceReader(manifest) for manifest in manifests]
        lengths = [manifest.document_lengths() for manifest in manifests]
        self.sampler = Sampler(lengths, [source.weight for source in chosen], seq_len, blend.seed, names=self.names)
        self.seq_len = seq_len
        self.masked_token = manifests[0].end_of_document if mask_end_of_document else None
        self.fingerprint = {
            "seed": blend.seed,
            "seq_len": seq_len,
            "mask_end_of_document": mask_end_of_document,
            "sources": [
                {"name": source.name, "weight": source.weight, "digest": manifest.digest()}
                for source, manifest in zip(chosen, manifests, strict=True)
            ],
        }
        self.vocab_size = manifests[0].vocab_size

    def tokens(self, index: int) -> tuple[np.ndarray[Any, Any], int]:
        """The seq_len + 1 tokens of a sample, int64, and its place in the blend."""
        sample = self.sampler.sample(index)
        reader = self.readers[sample.source]
        parts = [reader.read(span.document, span.offset, span.length) for span in sample.spans]
        return np.concatenate(parts).astype(np.int64), sample.source

    def micro_batch(self, indices: range) -> MicroBatch:
        """The samples of one micro-batch."""
        rows, sources = zip(*(self.tokens(index) for index in indices), strict=True)
        window = torch.from_numpy(np.stack(rows))
        tokens, labels = window[:, :-1].contiguous(), window[:, 1:].contiguous()
        mask = torch.ones(tokens.shape) if self.masked_token is None else (tokens != self.masked_token).float()
        positions = torch.arange(self.seq_len).repeat(len(tokens), 1)  # not expanded: overlapping memory cannot be pinned
        return MicroBatch(tokens, labels, positions, mask, torch.tensor(sources))

    def step(self, first_sample: int, mesh: Mesh, device: torch.device) -> Iterator[MicroBatch]:
        """This data-parallel rank's micro-batches of the global batch that starts at `first_sample`."""
        plan = mesh.plan
        for number in range(plan.num_microbatches):
            start = first_sample + (number * plan.dp + mesh.dp_rank) * plan.micro_batch
            yield self.micro_batch(range(start, start + plan.micro_batch)).to(device)
