"""Where the documents of a packed row end: for attention and RoPE (megatron-core's PackedSeqParams), for our attention and for Mamba.

Owns: that lengths are known on the host from the start, so that none of our layers asks the device for them, and that what follows from them is
worked out once for a micro-batch. Padding belongs to the document before it: it comes after, so nothing causal sees it. The `padded` fields stay
empty for that reason: TransformerEngine would compare them with the others on the host, in every layer, and lose its quicker kernels. Under context
parallelism lengths and ends are still those of the whole row: a rank's part of it follows from them (`context_parallel`, TransformerEngine alike).
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass
class Documents(PackedSeqParams):
    """PackedSeqParams that also know the lengths on the host."""

    lengths: tuple[int, ...] = ()
    """tokens of each document, padding included"""
    orders: dict[int, Any] = field(default_factory=dict, compare=False)
    """cp -> the order of the ranks' tokens (`context_parallel.order_of`)"""

    @cached_property
    def ids(self) -> Tensor:
        """int64 [1, s], on the device: for each token the number of its document."""
        return ids(self.cu_seqlens_q, sum(self.lengths))


def documents(cu_seqlens: Tensor, lengths: tuple[int, ...]) -> Documents:
    """cu_seqlens: int32 [documents + 1], from 0, on the device of the tokens; lengths: the same on the host."""
    assert len(cu_seqlens) == len(lengths) + 1, (cu_seqlens.shape, lengths)
    return Documents(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        lengths=lengths,
    )


def ids(ends: Tensor, length: int) -> Tensor:
    """int64 [1, length]: for each token the number of its document."""
    places = torch.arange(length, dtype=ends.dtype, device=ends.device)
    return torch.searchsorted(ends[1:], places, right=True).unsqueeze(0)


def segment_ends(packed: PackedSeqParams) -> Tensor:
    """Where documents end, their padding included, int32 on the device."""
    ends: Tensor = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
    return ends


def lengths_of(packed: PackedSeqParams) -> list[int]:
    """Tokens of each document, padding included; from the device where the host was not told."""
    if isinstance(packed, Documents):
        return list(packed.lengths)
    lengths: list[int] = segment_ends(packed).diff().tolist()
    return lengths
