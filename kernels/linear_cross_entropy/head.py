"""The LM head in pieces: logits of some tokens and rows at a time, in one buffer, and what the ranks tell each other about them.

Owns: how much is computed at once. A chunk is some tokens with all of this rank's real rows; a block, some rows with some or all tokens.
Legend: t tokens, h hidden, v rows of the vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prism.kernels.linear_cross_entropy.vocabulary import Vocabulary

CHUNK_BYTES = 512 * 2**20
"""of logits in a chunk, which the gradients of x and of the weight then read: products want 1,024 tokens and more"""
BLOCK_BYTES = 256 * 2**20
"""of logits in a block; a block's fp32 gradient may come on top"""
TOKENS_PER_BLOCK = 8192
ALIGNED = 128
"""tokens and rows are cut at multiples of it, as the tiles of matrix products want"""
ROW_UNIT = 16
"""a row of logits in memory has a multiple of it: 16-byte units, which odd vocabularies lack, are what fast products and loads need"""


@dataclass(frozen=True)
class Head:
    """A call's tensors (labels contiguous) and settings."""

    x_th: Tensor
    weight_vh: Tensor
    labels_t: Tensor
    vocabulary: Vocabulary
    chunk_tokens: int | None

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """(tokens, their logits over all real rows, and over padding rows up to a multiple of 128, never none), one buffer for all."""
        columns = min(_rounded_up(max(self.vocabulary.real_rows, 1), ALIGNED), self.weight_vh.shape[0])
        size = self.chunk_tokens or _even_chunk(len(self.x_th), CHUNK_BYTES // (columns * self.x_th.element_size()))
        buffer = _buffer(self.x_th, min(size, len(self.x_th)), columns)
        for tokens in _slices(len(self.x_th), size):
            yield tokens, self._logits(buffer, tokens, slice(0, columns))

    def blocks(self) -> Iterator[tuple[slice, int, Iterator[tuple[slice, Tensor]]]]:
        """(rows, how many of them are real, (tokens, their logits over these rows) for all tokens)."""
        real = self.vocabulary.real_rows
        size = max(min(self.tokens_per_block(), len(self.x_th)), 1)
        rows_at_once = max(BLOCK_BYTES // (size * self.x_th.element_size()) // ALIGNED, 1) * ALIGNED
        buffer = _buffer(self.x_th, size, min(rows_at_once, self.weight_vh.shape[0]))
        for rows in _slices(real, rows_at_once):
            whole = slice(rows.start, min(_rounded_up(rows.stop, ALIGNED), self.weight_vh.shape[0]))
            tokens = ((span, self._logits(buffer, span, whole)) for span in _slices(len(self.x_th), size))
            yield whole, rows.stop - rows.start, tokens

    def tokens_per_block(self) -> int:
        """As many as may be computed at once in a block."""
        return self.chunk_tokens or _even_chunk(len(self.x_th), TOKENS_PER_BLOCK)

    def _logits(self, buffer: Tensor, tokens: slice, rows: slice) -> Tensor:
        columns, count = rows.stop - rows.start, tokens.stop - tokens.start
        stride = _rounded_up(columns, ROW_UNIT)
        logits_tv = buffer[: count * stride].view(count, stride)[:, :columns]
        return torch.mm(self.x_th[tokens], self.weight_vh[rows].T, out=logits_tv)


def label_losses(found_2t: Tensor, labels_t: Tensor, ignore_index: int) -> Tensor:
    """Log-sum-exps and label logits -> losses [t]; infinite for a label that is no row."""
    return (found_2t[0] - found_2t[1]).where(labels_t != ignore_index, 0.0)


def of_all_ranks(found_2t: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Log-sum-exps and label logits over each rank's rows -> over all rows, in one exchange."""
    if group is None:
        return found_2t
    ranks = dist.get_world_size(group)
    all_r2t = found_2t.new_empty(ranks, *found_2t.shape)
    dist.all_gather_into_tensor(all_r2t.flatten(0, 1), found_2t, group=group)
    return torch.stack([all_r2t[:, 0].logsumexp(dim=0), all_r2t[:, 1].amax(dim=0)])


def start_sum(values: Tensor, group: dist.ProcessGroup | None) -> list[dist.Work]:
    """Begin to add `values` up over the ranks, in place; they are complete when each of the list has been waited for."""
    return [] if group is None else [dist.all_reduce(values, group=group, async_op=True)]


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _even_chunk(length: int, limit: int) -> int:
    """`length` cut into as few equal parts as `limit` allows; a multiple of 128."""
    parts = math.ceil(length / max(limit // ALIGNED * ALIGNED, ALIGNED))
    return max(_rounded_up(math.ceil(length / max(parts, 1)), ALIGNED), ALIGNED)


def _buffer(like: Tensor, tokens: int, columns: int) -> Tensor:
    return like.new_empty(tokens * _rounded_up(columns, ROW_UNIT))


def _rounded_up(length: int, unit: int) -> int:
    return -(-length // unit) * unit
