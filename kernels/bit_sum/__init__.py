"""The sum of tensors' bits, taken as integers: one public function, `bit_sum`. A flipped bit always changes it.

`reference.py` is the definition in plain torch; `fused.py` is one Triton kernel that reads every byte once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_prism.kernels.bit_sum import fused, reference
from megatron_prism.kernels.choice import Impl, use_fused

__all__ = ["bit_sum"]


@torch.no_grad()
def bit_sum(tensors: Sequence[Tensor], *, impl: Impl = "auto") -> Tensor:
    """Of all numbers of all tensors, their bits taken as signed integers of their size, modulo 2^64: int64 [].

    tensors: one or more, of 1, 2, 4 or 8 bytes a number, of any shape, contiguous, on one device. Neither order nor place matters, so that sums of
    parts add up. Errors: UserError when impl="fused" cannot be.
    """
    assert tensors and all(tensor.is_contiguous() for tensor in tensors)
    flat = [tensor.detach().view(-1).view(reference.INTEGERS[tensor.element_size()]) for tensor in tensors]
    obstacle = None if impl == "reference" else fused.obstacle(flat)
    run = fused.total if use_fused(impl, "bit_sum", flat[0], obstacle) else reference.total
    return run(flat)
