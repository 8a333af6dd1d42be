"""`bit_sum` as one Triton kernel for each tensor, whose programs each walk over the whole of it in strides. torch sums whole numbers of two bytes
at a tenth of the rate at which it copies (one H200).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_prism.kernels.bit_sum.reference import INTEGERS
from megatron_prism.kernels.choice import triton_obstacle

BLOCK = 4096
PROGRAMS = 2048
"""for one tensor at most: enough to keep every multiprocessor reading, and few enough sums to add"""
MOST_STRIDES = 1 << 14
"""of a program: so many numbers of two bytes fit into a sum of four"""


def obstacle(flat: Sequence[Tensor]) -> str | None:
    """Why the kernel cannot do this case; None if it can."""
    found = triton_obstacle(flat, tuple(INTEGERS.values()))
    if found is None and max(numbers.numel() for numbers in flat) > MOST_STRIDES * PROGRAMS * BLOCK:
        return f"a tensor has more than {MOST_STRIDES * PROGRAMS * BLOCK} numbers"
    return found


def total(flat: Sequence[Tensor]) -> Tensor:
    """`bit_sum` of integers."""
    from megatron_prism.kernels.bit_sum.program import program

    counts = [min(-(-numbers.numel() // BLOCK), PROGRAMS) for numbers in flat]
    sums = torch.zeros(sum(counts), dtype=torch.int64, device=flat[0].device)
    for numbers, own, count in zip(flat, sums.split(counts), counts, strict=True):
        if count:
            program[(count,)](numbers, own, numbers.numel(), count, WIDE=numbers.element_size() > 2, BLOCK=BLOCK)
    return sums.sum()
