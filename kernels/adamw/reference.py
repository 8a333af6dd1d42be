"""The definition of `adamw`, in plain torch."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_prism.kernels.choice import compute_dtype

if TYPE_CHECKING:
    from megatron_prism.kernels.adamw import Hyperparameters


QUIET_NAN = 0x7FC0
"""in bf16"""


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """An fp32 tensor as its nearest bf16 (ties away from zero) and the int16 that, added below bf16's bits, gives it back."""
    bits = master.contiguous().view(torch.int32)
    upper = torch.where(master.isnan(), QUIET_NAN, (bits + 0x8000) >> 16)  # the largest NaN would round up to minus zero
    lower = torch.where(master.isnan(), 0, bits - (upper << 16))
    return upper.to(torch.int16).view(torch.bfloat16), lower.to(torch.int16)


def join(upper: Tensor, lower: Tensor) -> Tensor:
    """The fp32 tensor whose `split` this is, bit for bit; of a NaN, one."""
    return ((upper.view(torch.int16).to(torch.int32) << 16) + lower).view(torch.float32)


def update(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    master: Tensor | None,
    gradient_scale: Tensor | None,
    settings: "Hyperparameters",
) -> None:
    """`adamw`."""
    if gradient_scale is not None and not gradient_scale.is_cuda and gradient_scale.isnan():
        return
    wide = compute_dtype(weight)
    g = gradient.to(wide) if gradient_scale is None else gradient.to(wide) * gradient_scale
    beta1, beta2 = settings.betas
    m = exp_avg.to(wide) * beta1 + g * (1 - beta1)
    v = exp_avg_sq.to(wide) * beta2 + g * g * (1 - beta2)
    w = weight if master is None else master if master.dtype == torch.float32 else join(weight, master)
    w = w * (1 - settings.lr * settings.weight_decay)
    root = v.sqrt() / math.sqrt(1 - beta2**settings.step) + settings.eps
    w = w - settings.lr / (1 - beta1**settings.step) * m / root
    upper, lower = split(w) if master is not None and master.dtype == torch.int16 else (w, w)
    for held, new in ((exp_avg, m), (exp_avg_sq, v), (weight, upper), *([] if master is None else [(master, lower)])):
        # a NaN for a scale stands for: leave everything as it is; on a device nobody waits to look at it
        held.copy_(new if gradient_scale is None or not held.is_cuda else torch.where(gradient_scale.isnan(), held, new.to(held.dtype)))
