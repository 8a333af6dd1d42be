"""The gated RMS norm at the end of a Mamba-2 mixer: one public function, `gated_norm`.

`reference.py` is the definition; `fused.py` hands the work to mamba-ssm's Triton kernel.
"""

from torch import Tensor

from megatron_prism.kernels.choice import Impl, use_fused
from megatron_prism.kernels.gated_norm import fused, reference

__all__ = ["gated_norm"]


def gated_norm(y: Tensor, z: Tensor, weight_d: Tensor, *, group_size: int, eps: float, impl: Impl = "auto") -> Tensor:
    """g / rms(g) * weight with g = y * silu(z), each group of `group_size` neighbouring channels normalised alone.

    y, z [..., d], d a multiple of group_size. Computed in fp32 (fp64 for fp64 inputs) -> [..., d] in y's type. Only y and z (and, fused, one number a
    group) are kept for the backward pass. Errors: UserError when impl="fused" cannot do the case.
    """
    assert y.shape == z.shape and y.shape[-1] % group_size == 0
    obstacle = None if impl == "reference" else fused.obstacle(y, group_size)
    run = fused.norm if use_fused(impl, "gated_norm", y, obstacle) else reference.norm
    return run(y, z, weight_d, group_size, eps)
