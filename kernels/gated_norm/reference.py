"""The definition of `gated_norm`, in plain torch. Intermediate values are computed again in the backward pass, not kept: they are fp32 and large."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_prism.kernels.choice import compute_dtype


def norm(y: Tensor, z: Tensor, weight_d: Tensor, group_size: int, eps: float) -> Tensor:
    """`gated_norm`; rounded to y's type before the weight, as transformers' gated norms do."""
    if not torch.is_grad_enabled():
        return _norm(y, z, weight_d, group_size, eps)
    out: Tensor = checkpoint(_norm, y, z, weight_d, group_size, eps, use_reentrant=False, preserve_rng_state=False)
    return out


def _norm(y: Tensor, z: Tensor, weight_d: Tensor, group_size: int, eps: float) -> Tensor:
    wide = compute_dtype(y)
    grouped = (y.to(wide) * F.silu(z.to(wide))).unflatten(-1, (-1, group_size))
    normed = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)
    return (weight_d * normed.flatten(-2).to(y.dtype)).contiguous()
