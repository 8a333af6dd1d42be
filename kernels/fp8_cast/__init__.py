"""FP8 (e4m3) of fp32 master weights, by current scaling: two public functions, `scales_of` and `fp8_cast`.

What TransformerEngine's quantizer makes of the master rounded to bf16, bit for bit. A master may be part of a weight: the scale is the whole one's.
`reference.py` is the definition in plain torch; `fused.py` is one Triton kernel that reads and writes every byte once.
"""

import torch
from torch import Tensor

from megatron_prism.kernels.choice import Impl, use_fused
from megatron_prism.kernels.fp8_cast import fused, reference
from megatron_prism.kernels.fp8_cast.reference import largest, scales_of

__all__ = ["fp8_cast", "largest", "scales_of"]


@torch.no_grad()
def fp8_cast(master: Tensor, scale: Tensor, out: Tensor, *, impl: Impl = "auto") -> None:
    """out = e4m3(bf16(master) * scale), as bytes.

    master: fp32, of any shape, contiguous. scale: fp32, one number on the same device; times it no value may exceed e4m3's largest by more than
    rounding, as `scales_of` sees to. out: uint8, of the same shape, contiguous. Errors: UserError when impl="fused" cannot be.
    """
    assert master.shape == out.shape and master.dtype == torch.float32 and out.dtype == torch.uint8
    obstacle = None if impl == "reference" else fused.obstacle(master, out)
    run = fused.cast if use_fused(impl, "fp8_cast", master, obstacle) else reference.cast
    run(master, scale, out)
