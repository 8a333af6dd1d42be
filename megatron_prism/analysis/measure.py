"""Two (or three) tensors of one shape -> sums, in blocks that fit a cache: besides the tensors nothing of their size is made.

Owns: exact comparisons. A difference of two bf16 weights, times 100 / percent, is exact in fp32, so a change of exactly 1 % counts as a change.
Sums are pairwise in fp32 within a block and in float64 over blocks, rounded once, so that they are the same whoever takes which blocks;
a block whose squares are too large or too small for fp32 is summed in float64.
Refuses: NaN and infinity, by the element.
"""

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_prism.analysis.sums import THRESHOLDS, Cosine, Counts, Sums

BLOCK = 1 << 18
"""elements: fp32 blocks of a few operands stay in the processor's cache, and threads seldom wait for the interpreter's lock"""
RUN = 8 * BLOCK
"""elements that one thread takes at a time"""
SMALL = 1e-30
"""sum of squares of a block below which some of them may have left fp32's range"""
LARGE = 1e30
"""sum of squares of two blocks up to which no product of them leaves it"""
FACTORS = tuple(np.float32(100.0 / percent) for percent in THRESHOLDS)
"""a change times this is compared with the weight"""

Spread = Callable[..., Iterable[Any]]
"""`map`, or that of a pool of threads"""
Block = NDArray[np.float32]


class NotFiniteError(ValueError):
    """A weight that is NaN or infinite. which: 0 for the first tensor; count: how many of its elements."""

    def __init__(self, which: int, count: int) -> None:
        super().__init__(which, count)
        self.which, self.count = which, count


class _Room(threading.local):
    """A thread's blocks for what lies between: made once, since the pages of new ones cost more than the arithmetic."""

    def __init__(self) -> None:
        self.fp32 = torch.empty(7, BLOCK)
        self.change, self.other, self.size, self.bound, self.scratch = self.fp32.numpy()[2:]
        self.bf16 = torch.empty(BLOCK, dtype=torch.bfloat16)
        self.mask = np.empty(BLOCK, bool)

    def widened(self, block: Tensor, place: int) -> Block:
        """A block in fp32: as it lies, or in one of the first two places."""
        if block.dtype == torch.float32:
            return block.numpy()
        return self.fp32[place, : block.numel()].copy_(block).numpy()

    def rounded(self, block: Tensor, place: int) -> Block:
        """A block rounded to bf16, in fp32."""
        half = self.bf16[: block.numel()].copy_(block)
        return self.fp32[place, : block.numel()].copy_(half).numpy()


_room = _Room()


def sums(old: Tensor, new: Tensor, spread: Spread = map) -> Sums:
    """Of the update from `old` to `new`. Errors: NotFiniteError."""
    runs = list(spread(_sums, *_cut(RUN, old, new)))
    squares, changes, fp32, bf16 = zip(*runs, strict=True)
    nothing = Counts(0, (0,) * len(THRESHOLDS))
    result = Sums(old.numel(), math.fsum(chain(*squares)), math.fsum(chain(*changes)), sum(fp32, nothing), sum(bf16, nothing))
    if not (math.isfinite(result.old) and math.isfinite(result.change)):
        _refuse(old, new)
    return result


def cosine(start: Tensor, one: Tensor, other: Tensor, spread: Spread = map) -> Cosine:
    """Of the updates start -> one and start -> other."""
    products, ones, others = zip(*spread(_products, *_cut(RUN, start, one, other)), strict=True)
    return Cosine(math.fsum(chain(*products)), math.fsum(chain(*ones)), math.fsum(chain(*others)))


@np.errstate(all="ignore")
def _sums(old: Tensor, new: Tensor) -> tuple[list[float], list[float], Counts, Counts]:
    """Of one run: squares of the weights and of the changes, a block each, and counts in both types."""
    room, in_bf16 = _room, old.dtype == new.dtype == torch.bfloat16
    squares, changes = [], []
    fp32 = bf16 = Counts(0, (0,) * len(THRESHOLDS))
    for a, b in _blocks(old, new):
        x = room.widened(a, 0)
        change = np.subtract(room.widened(b, 1), x, out=room.change[: x.size])
        squares.append(_square(x))
        changes.append(_square(change))
        found = _counts(x, change)
        fp32 = fp32 + found
        bf16 = bf16 + (found if in_bf16 else _counts_in_bf16(a, b))
    return squares, changes, fp32, bf16


@np.errstate(all="ignore")
def _products(start: Tensor, one: Tensor, other: Tensor) -> tuple[list[float], list[float], list[float]]:
    """Of one run, a block each: products of the two changes, squares of either."""
    room = _room
    products, ones, others = [], [], []
    for s, a, b in _blocks(start, one, other):
        x = room.widened(s, 0)
        first = np.subtract(room.widened(a, 1), x, out=room.change[: x.size])
        second = np.subtract(room.widened(b, 1), x, out=room.other[: x.size])
        ones.append(_square(first))
        others.append(_square(second))
        products.append(_product(first, second, ones[-1], others[-1]))
    return products, ones, others


def _cut(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return (tensor.reshape(-1).split(size) for tensor in tensors)


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*_cut(BLOCK, *tensors), strict=True)


def _square(block: Block) -> float:
    found = float(np.multiply(block, block, out=_room.scratch[: block.size]).sum())
    if SMALL <= found < math.inf or (found == 0.0 and not block.any()):
        return found
    return float(np.square(block, dtype=np.float64).sum())


def _product(first: Block, second: Block, *squares: float) -> float:
    """Of two blocks with these sums of squares."""
    if all(SMALL <= square <= LARGE for square in squares):
        return float(np.multiply(first, second, out=_room.scratch[: first.size]).sum())
    return float(np.multiply(first, second, dtype=np.float64).sum())


def _counts(old: Block, change: Block) -> Counts:
    """Of one block. Where old and change are both 0, no threshold is above the change, and it is none all the same.

    What is below one threshold is below every higher one, in fp32 too.
    """
    room, number = _room, old.size
    size, bound = np.abs(change, out=room.size[:number]), np.abs(old, out=room.bound[:number])
    scratch, mask = room.scratch[:number], room.mask[:number]
    changed = int(np.count_nonzero(np.greater(size, 0, out=mask)))
    if not changed:
        return Counts(number, (number,) * len(THRESHOLDS))
    still = 0 if np.count_nonzero(np.greater(bound, 0, out=mask)) == number else int(np.count_nonzero((bound == 0) & (size == 0)))
    below = [still + int(np.count_nonzero(np.less(np.multiply(size, factor, out=scratch), bound, out=mask))) for factor in FACTORS]
    return Counts(number - changed, tuple(below))


def _counts_in_bf16(a: Tensor, b: Tensor) -> Counts:
    old = _room.rounded(a, 0)
    return _counts(old, np.subtract(_room.rounded(b, 1), old, out=_room.change[: old.size]))


def _refuse(*tensors: Tensor) -> None:
    for which, tensor in enumerate(tensors):
        count = tensor.numel() - int(torch.isfinite(tensor).sum())
        if count:
            raise NotFiniteError(which, count)
    raise AssertionError("sums of finite weights beyond float64's range")
