"""Inputs of unequal length, of like length together in rows that are padded on the right, and the mean over each one's own tokens. Pure.

A causal model does not look behind itself: padding that comes after a text changes nothing of it, so that no mask is needed in the model, only here.
Legend: b rows of a batch, s padded length, h width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PAD_TOKEN = 0
"""any id will do"""


class PaddedBatch(NamedTuple):
    """ids [b, s]; lengths [b]: real tokens of each row; places: which inputs the rows are."""

    ids: Tensor
    lengths: Tensor
    places: tuple[int, ...]


def padded_batches(inputs: Sequence[Sequence[int]], tokens: int, multiple: int = 1) -> list[PaddedBatch]:
    """All inputs, the longest first. tokens: of a batch at most, padding included (a longer input comes alone); multiple: what divides s."""
    order = sorted(range(len(inputs)), key=lambda place: (-len(inputs[place]), place))
    found = []
    while order:
        length = -(-len(inputs[order[0]]) // multiple) * multiple
        rows = max(1, tokens // length)
        places, order = order[:rows], order[rows:]
        ids = torch.full((len(places), length), PAD_TOKEN, dtype=torch.int64)
        for row, place in zip(ids, places, strict=True):
            row[: len(inputs[place])] = torch.tensor(inputs[place])
        found.append(PaddedBatch(ids, torch.tensor([len(inputs[place]) for place in places]), tuple(places)))
    return found


def sum_of_real(hidden_bsh: Tensor, lengths_b: Tensor, first: int = 0) -> Tensor:
    """The sum over each row's own tokens, fp32 [b, h]. first: which token of the whole rows these begin with."""
    positions_s = torch.arange(first, first + hidden_bsh.shape[1], device=hidden_bsh.device)
    padding_bs = positions_s[None, :] >= lengths_b[:, None]
    return hidden_bsh.float().masked_fill(padding_bs[..., None], 0.0).sum(dim=1)
