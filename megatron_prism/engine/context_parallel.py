"""Which part of each sequence a context-parallel rank holds, and how it gets at the rest.

Each document (without packing: each row) is cut into 2 * cp equal chunks, of which rank r holds the r-th from the front and the r-th from the back
(zigzag): causal attention then costs every rank the same. It is the order that megatron-core and TransformerEngine take for granted.
Owns: a rank's tokens, the order of all ranks' tokens laid end to end, and the two exchanges: every token for all (keys and values), and a part of the
tokens for a part of the channels (Mamba). Refuses (by assertion; plans are checked before): documents that 2 * cp does not cut evenly.
Legend: s sequence, b batch, w channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor

from megatron_prism.engine.documents import Documents, ids, segment_ends


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, stop) of a row, which belong to the document that starts at `document`."""

    document: int
    start: int
    stop: int


def chunks(lengths: Sequence[int], cp: int, rank: int) -> list[Chunk]:
    """What a rank holds of documents that lie end to end, in the order in which it holds it; the whole of each where cp is 1."""
    found, document = [], 0
    for length in lengths:
        size, rest = divmod(length, 2 * cp) if cp > 1 else (length, 0)
        assert rest == 0, f"2 * cp = {2 * cp} must divide a document of {length} tokens"
        starts = (rank * size, (2 * cp - 1 - rank) * size) if cp > 1 else (0,)
        found += [Chunk(document, document + start, document + start + size) for start in starts]
        document += length
    return found


@dataclass(frozen=True)
class Order:
    """Where the tokens of a row are when the parts of all ranks lie end to end: int64 [s] each.

    places: of each token in true order, its place there; tokens: of each place, its token.
    """

    places: Tensor
    tokens: Tensor


def order(ends: Tensor, length: int, cp: int) -> Order:
    """Of a row of `length` tokens in documents with these ends (int32, from 0); worked out on their device, which nothing waits for."""
    token, document = torch.arange(length, device=ends.device), ids(ends, length).squeeze(0)
    start, size = ends.long()[document], ends.long().diff()[document] // (2 * cp)
    chunk, offset = (token - start) // size, (token - start) % size
    from_behind = chunk >= cp
    rank = torch.where(from_behind, 2 * cp - 1 - chunk, chunk)
    places = rank * (length // cp) + start // cp + from_behind * size + offset
    return Order(places, torch.empty_like(places).scatter_(0, places, token))


def order_of(packed: PackedSeqParams | None, length: int, cp: int, device: torch.device) -> Order:
    """The same for packed documents, or for a row that is one; worked out once for a micro-batch that comes with its `Documents`."""
    if packed is None:
        return _order_of_row(length, cp, device)
    if not isinstance(packed, Documents):
        return order(segment_ends(packed), length, cp)
    if cp not in packed.orders:
        packed.orders[cp] = order(packed.cu_seqlens_q, length, cp)
    return cast(Order, packed.orders[cp])


@lru_cache(maxsize=8)
def _order_of_row(length: int, cp: int, device: torch.device) -> Order:
    return order(torch.tensor([0, length], dtype=torch.int32, device=device), length, cp)


def gather(x_sbw: Tensor, packed: PackedSeqParams | None, group: dist.ProcessGroup) -> Tensor:
    """This rank's tokens [s / cp, ...] -> all ranks' tokens [s, ...] in true order. Gradients are summed over the ranks."""
    whole: Tensor = gather_from_sequence_parallel_region(x_sbw, tensor_parallel_output_grad=True, group=group)
    found = order_of(packed, whole.shape[0], group.size(), whole.device)
    return cast(Tensor, Reordered.apply(whole, found.places, found.tokens))


def to_channels(parts: Sequence[Tensor], packed: PackedSeqParams | None, group: dist.ProcessGroup) -> Tensor:
    """cp tensors [s / cp, b, w], one for each rank -> what is this rank's of all tokens, in true order, [s, b, w]."""
    whole = all_to_all(group, torch.stack(list(parts))).flatten(0, 1)
    found = order_of(packed, whole.shape[0], group.size(), whole.device)
    return cast(Tensor, Reordered.apply(whole, found.places, found.tokens))


def to_tokens(x_sbw: Tensor, packed: PackedSeqParams | None, group: dist.ProcessGroup) -> Tensor:
    """A part of the channels of all tokens in true order, [s, b, w] -> all channels of this rank's tokens, [s / cp, b, cp * w]."""
    found = order_of(packed, x_sbw.shape[0], group.size(), x_sbw.device)
    parts = cast(Tensor, Reordered.apply(x_sbw, found.tokens, found.places)).unflatten(0, (group.size(), -1))
    received: Tensor = all_to_all(group, parts)
    return received.permute(1, 2, 0, 3).flatten(2)


class Reordered(torch.autograd.Function):
    """Rows in another order. The gradient is read in the inverse order: torch would add it up row by row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(0, inverse), None, None
