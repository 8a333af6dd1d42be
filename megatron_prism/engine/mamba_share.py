"""Which part of a Mamba-2 mixer a tensor-parallel rank holds, that part as pieces of global tensors in a checkpoint, and which heads of it a
context-parallel rank scans.

Owns: the rows of each tensor, in Hugging Face's order, so that conversion rules are plain copies. Refuses (by assertion; plans are checked before):
heads and groups that tp, or tp * cp, does not cut evenly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_prism.families.model_config import MambaConfig

Rows = tuple[tuple[int, int], ...]
"""(start, length) of rows of a global tensor, in the order in which a rank holds them"""


def replicates_groups(mamba: MambaConfig, tp: int) -> bool:
    """Whether every rank makes all of B and C, because ranks outnumber the groups."""
    return mamba.num_groups % tp != 0


@dataclass(frozen=True)
class Share:
    """What one tensor-parallel rank holds of a mixer. Global rows are Hugging Face's: in_proj [z|x|B|C|dt], convolution [x|B|C]."""

    mamba: MambaConfig
    tp: int
    rank: int

    def __post_init__(self) -> None:
        groups, heads = self.mamba.num_groups, self.mamba.num_heads
        assert heads % self.tp == 0 and heads % groups == 0, f"tp={self.tp} and {groups} groups must divide {heads} Mamba heads"
        for count in (groups, self.mamba.norm_groups):
            assert count % self.tp == 0 or self.tp % count == 0, f"tp={self.tp} must divide {count} Mamba groups, or they tp"

    @property
    def heads(self) -> int:
        return self.mamba.num_heads // self.tp

    @property
    def inner(self) -> int:
        """Channels of x, z and the output."""
        return self.mamba.d_inner // self.tp

    @property
    def replicated(self) -> bool:
        return replicates_groups(self.mamba, self.tp)

    @property
    def groups(self) -> int:
        """Groups whose B and C this rank makes."""
        return self.mamba.num_groups if self.replicated else self.mamba.num_groups // self.tp

    @property
    def bc(self) -> int:
        """Channels of B and C together."""
        return 2 * self.groups * self.mamba.state_dim

    @property
    def own_groups(self) -> slice:
        """The groups of this rank's heads among those that it makes."""
        first = self.rank * self.mamba.num_groups // self.tp if self.replicated else 0
        return slice(first, first + max(self.mamba.num_groups // self.tp, 1))

    @property
    def inner_rows(self) -> Rows:
        return ((self.rank * self.inner, self.inner),)

    @property
    def head_rows(self) -> Rows:
        return ((self.rank * self.heads, self.heads),)

    @property
    def bc_rows(self) -> Rows:
        """Rows of [B|C] alone."""
        if self.replicated:
            return ((0, self.bc),)
        half = self.bc // 2
        return ((self.rank * half, half), (self.mamba.bc_size // 2 + self.rank * half, half))

    @property
    def conv_rows(self) -> Rows:
        """Rows of `conv1d`, that is without replicated B and C."""
        return self.inner_rows if self.replicated else (*self.inner_rows, *shifted(self.bc_rows, self.mamba.d_inner))

    @property
    def in_proj_rows(self) -> Rows:
        """Rows of `in_proj`, that is without replicated B and C."""
        d_inner = self.mamba.d_inner
        heads = shifted(self.head_rows, 2 * d_inner + self.mamba.bc_size)
        return (*self.inner_rows, *shifted(self.conv_rows, d_inner), *heads)


@dataclass(frozen=True)
class ScannedPart:
    """The heads that one context-parallel rank convolves and scans, over the whole sequence, of those that its tensor-parallel rank holds.

    Weights are whole on each of them: a rank's gradient is that of its own heads and zero elsewhere, and their sum over the ranks is all of it.
    """

    share: Share
    cp: int
    rank: int

    def __post_init__(self) -> None:
        groups = self._own_groups
        assert self.share.heads % self.cp == 0, f"cp={self.cp} must divide the {self.share.heads} Mamba heads of a tensor-parallel rank"
        assert groups % self.cp == 0 or self.cp % groups == 0, f"cp={self.cp} must divide the {groups} groups of a tensor-parallel rank, or they cp"

    @property
    def _own_groups(self) -> int:
        return self.share.own_groups.stop - self.share.own_groups.start

    @property
    def heads_held(self) -> int:
        """How many."""
        return self.share.heads // self.cp

    @property
    def heads(self) -> slice:
        """Which of the tensor-parallel rank's."""
        return slice(self.rank * self.heads_held, (self.rank + 1) * self.heads_held)

    @property
    def groups(self) -> int:
        """Groups of B and C of these heads; one that several ranks share goes to each of them."""
        return max(self._own_groups // self.cp, 1)

    @property
    def channels(self) -> tuple[slice, slice, slice]:
        """Of x, B and C among the channels [x|B|C] that the tensor-parallel rank makes, its own and replicated ones."""
        head_dim, state_dim, share = self.share.mamba.head_dim, self.share.mamba.state_dim, self.share
        first, size = share.own_groups.start + self.rank * self._own_groups // self.cp, self.groups * state_dim
        b, c = (share.inner + part * share.bc // 2 + first * state_dim for part in (0, 1))
        return slice(self.heads.start * head_dim, self.heads.stop * head_dim), slice(b, b + size), slice(c, c + size)

    @property
    def convolved(self) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The same channels, of the convolution and of the one of replicated B and C, which is empty where there is none."""
        x, b, c = self.channels
        if not self.share.replicated:
            return (x, b, c), ()
        b, c = (slice(part.start - self.share.inner, part.stop - self.share.inner) for part in (b, c))
        return (x,), (b, c)


def shifted(rows: Rows, by: int) -> Rows:
    """The same rows, further down."""
    return tuple((start + by, length) for start, length in rows)


def sharded_rows(
    weight: torch.nn.Parameter, key: str, rows: Rows, total: int, replica_id: tuple[int, int, int]
) -> ShardedTensor | ShardedTensorFactory:
    """A parameter as the given rows of a global tensor of `total` rows; pieces are views of it, in its order."""

    def build(key: str, tensor: Tensor, replica_id: Any, flattened_range: None) -> list[ShardedTensor]:
        pieces: Sequence[Tensor] = [tensor] if len(rows) == 1 else tensor.detach().split([length for _, length in rows])
        rest = tuple(tensor.shape[1:])
        zeros = (0,) * len(rest)
        return [
            # axis_fragmentations=None: an uneven cut, whose cover of the whole torch checks at save
            ShardedTensor(key, piece, piece.dtype, tuple(piece.shape), (total, *rest), (start, *zeros), None, replica_id)
            for piece, (start, _) in zip(pieces, rows, strict=True)
        ]

    if len(rows) == 1:
        return build(key, weight, replica_id, None)[0]
    return ShardedTensorFactory(key, weight, build, torch.cat, replica_id)
