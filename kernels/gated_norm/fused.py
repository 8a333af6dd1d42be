"""`gated_norm` on mamba-ssm's Triton kernel (rmsnorm_fn of 2.3.2.post1). Owns: what it cannot do. It rounds once, after the weight."""

import importlib.util

import torch
from torch import Tensor

LARGEST_GROUP_BYTES = 65536
"""a group of channels is one block of the kernel"""


def obstacle(y: Tensor, group_size: int) -> str | None:
    """Why mamba-ssm cannot do this case; None if it can."""
    if not y.is_cuda:
        return "the tensors are not on CUDA"
    if importlib.util.find_spec("mamba_ssm") is None:
        return "mamba-ssm is not installed (pip install megatron-prism[gpu])"
    if y.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"mamba-ssm does not compute in {y.dtype}"
    if group_size * y.element_size() > LARGEST_GROUP_BYTES:
        return f"a group of {group_size} channels exceeds the {LARGEST_GROUP_BYTES} bytes that mamba-ssm's kernel holds"
    return None


def norm(y: Tensor, z: Tensor, weight_d: Tensor, group_size: int, eps: float) -> Tensor:
    """`gated_norm`."""
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    flat: Tensor = rmsnorm_fn(
        y.reshape(-1, y.shape[-1]), weight_d, None, z=z.reshape(-1, z.shape[-1]), eps=eps, group_size=group_size, norm_before_gate=False
    )
    return flat.view(y.shape)
