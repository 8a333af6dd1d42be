"""One step of AdamW on one tensor: one public function, `adamw`, and the two halves of a split master weight.

`reference.py` is the definition in plain torch; `fused.py` is one Triton kernel that reads and writes every byte once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_prism.kernels.adamw import fused, reference
from megatron_prism.kernels.adamw.reference import join, split
from megatron_prism.kernels.choice import Impl, use_fused

__all__ = ["Hyperparameters", "adamw", "join", "split"]


@dataclass(frozen=True)
class Hyperparameters:
    """Of one step (Loshchilov & Hutter 2019, algorithm 2). step: counted from 1, for the moments' bias correction."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    step: int


@torch.no_grad()
def adamw(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    settings: Hyperparameters,
    *,
    master: Tensor | None = None,
    gradient_scale: Tensor | None = None,
    impl: Impl = "auto",
) -> None:
    """Update weight, moments and master in place, all of one shape and contiguous.

    weight: fp32 (fp64 too in the reference) alone; or bf16 with master: fp32, or int16, the lower half of a split fp32 master (`split`).
    gradient, exp_avg, exp_avg_sq: fp32 or bf16; sums in fp32. gradient_scale: one number on the device, times which the gradient counts (clipping);
    where it is NaN nothing changes: how a step without usable gradients is left out with nobody waiting to see it.
    A bf16 weight is the master rounded to nearest; ties, with a split master, away from zero. Errors: UserError when impl="fused" cannot be.
    """
    assert weight.shape == gradient.shape == exp_avg.shape == exp_avg_sq.shape and (master is None or master.shape == weight.shape)
    assert (master is None) == (weight.dtype != torch.bfloat16), "bf16 weights, and only they, have a master"
    obstacle = None if impl == "reference" else fused.obstacle(weight, gradient, exp_avg, exp_avg_sq, master)
    run = fused.update if use_fused(impl, "adamw", weight, obstacle) else reference.update
    run(weight, gradient, exp_avg, exp_avg_sq, master, gradient_scale, settings)
