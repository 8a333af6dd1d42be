"""The definition of `fp8_cast`, in plain torch, and the scales, which are few numbers and need no kernel."""

from collections.abc import Sequence

import torch
from torch import Tensor

FP8_MAX = 448.0
"""the largest number of e4m3"""


def largest(masters: Sequence[Tensor]) -> Tensor:
    """Each master's largest absolute value after rounding to bf16, fp32 [n]: rounding keeps the order, so the largest rounds to the largest."""
    return torch.stack(torch._foreach_norm(list(masters), torch.inf)).bfloat16().float()


def scales_of(amaxes: Tensor) -> tuple[Tensor, Tensor]:
    """(scales, their inverses) of weights with these largest absolute values, fp32 [n]; 1 for zero and what is no number, as TransformerEngine."""
    usable = (amaxes > 0) & amaxes.isfinite()
    # a tensor over a tensor: torch makes a number over a tensor of the reciprocal, which is off by a bit for a quarter of all bf16 numbers
    quotient = torch.full_like(amaxes, FP8_MAX) / torch.where(usable, amaxes, FP8_MAX)
    scales = quotient.clamp(max=torch.finfo(torch.float32).max)
    return scales, scales.reciprocal()


def cast(master: Tensor, scale: Tensor, out: Tensor) -> None:
    """`fp8_cast`."""
    out.copy_((master.bfloat16().float() * scale).to(torch.float8_e4m3fn).view(torch.uint8))
