"""`fp8_cast` as one Triton kernel: a pass over memory, 5 bytes a weight."""

import torch
from torch import Tensor

from megatron_prism.kernels.choice import triton_obstacle

BLOCK = 2048


def obstacle(master: Tensor, out: Tensor) -> str | None:
    """Why the kernel cannot do this case; None if it can."""
    found = triton_obstacle([master, out], (torch.float32, torch.uint8))
    if found is None and not (master.is_contiguous() and out.is_contiguous()):
        return "a tensor is not contiguous"
    if found is None and master.is_cuda and torch.cuda.get_device_capability(master.device) < (8, 9):
        return "the device has no e4m3 (compute capability 8.9)"
    return found


def cast(master: Tensor, scale: Tensor, out: Tensor) -> None:
    """`fp8_cast`."""
    from megatron_prism.kernels.fp8_cast.program import program

    count = master.numel()
    if count:
        program[(-(-count // BLOCK),)](master, scale, out, count, BLOCK=BLOCK)
