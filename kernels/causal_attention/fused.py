"""`causal_attention` on FlashAttention-4 (flash_attn.cute of flash-attn-4 4.0.0b36), whose kernels are compiled at their first use.

Owns: what those kernels cannot do (`obstacle`), and the layouts that they expect.
"""

import functools
from importlib import metadata

import torch
from torch import Tensor

TYPES = (torch.bfloat16, torch.float16)
VERSION = "4.0.0b36"
"""the one that was held to the reference; all versions are betas so far"""
HEAD_DIMS = (64, 128)
"""those held to the reference on Hopper, and what the families have. The library takes others, and of some its gradients are wrong by their own norm,
without an error: 16 and 80, where 32, 96, 192 and 256 are right (tests/gpu/test_gpu_attention.py)"""
CAPABILITIES = (9, 10)
"""major compute capabilities: Hopper, Blackwell of data centres"""


def obstacle(q_sbqd: Tensor) -> str | None:
    """Why FlashAttention-4 cannot take such queries; None if it can."""
    if not q_sbqd.is_cuda:
        return "the tensors are not on CUDA"
    if q_sbqd.dtype not in TYPES:
        return f"FlashAttention-4 does not compute in {q_sbqd.dtype}"
    return library_obstacle(q_sbqd.device, q_sbqd.shape[-1])


def library_obstacle(device: torch.device, head_dim: int) -> str | None:
    """Why the library cannot be called on this GPU for heads of this dimension; None if it can."""
    return missing() or device_obstacle(torch.cuda.get_device_capability(device)[0], head_dim)


@functools.cache
def missing() -> str | None:
    """Why the library cannot be called: it is not installed, or not to be imported; None if it can."""
    if installed() is None:
        return "flash-attn-4 is not installed (pip install megatron-prism[flash])"
    try:
        import flash_attn.cute  # noqa: F401
    except Exception as error:  # whatever its libraries raise: a missing one, a wrong CUDA, a name of another version
        return f"flash-attn-4 {installed()} cannot be imported ({type(error).__name__}: {error})"
    return None


def installed() -> str | None:
    """The version that is installed; None for none."""
    try:
        return metadata.version("flash-attn-4")
    except metadata.PackageNotFoundError:
        return None


def device_obstacle(capability: int, head_dim: int) -> str | None:
    """Why heads of this dimension cannot run on a GPU of this major compute capability; None if they can."""
    if capability not in CAPABILITIES:
        return f"FlashAttention-4 is for GPUs of compute capability {CAPABILITIES[0]} and {CAPABILITIES[1]}, this one has {capability}"
    if head_dim not in HEAD_DIMS:
        return f"FlashAttention-4 is proved for heads of {HEAD_DIMS[0]} and {HEAD_DIMS[1]}, these have {head_dim}"
    return None


def attend(
    q_sbqd: Tensor,
    k_tbkd: Tensor,
    v_tbkd: Tensor,
    scale: float,
    window: int | None,
    ends: Tensor | None,
    longest: int | None,
    deterministic: bool,
) -> Tensor:
    """`causal_attention`. Batch and sequence change places as views; with b > 1 the caller's next reshape copies the output."""
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    options = {
        "softmax_scale": scale,
        "causal": True,
        "window_size": (None, None) if window is None else (window - 1, 0),
        "deterministic": deterministic,
    }
    if ends is None:
        out_bsqd, _ = flash_attn_func(*(x.transpose(0, 1) for x in (q_sbqd, k_tbkd, v_tbkd)), **options)
        return out_bsqd.transpose(0, 1)
    packed = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": longest, "max_seqlen_k": longest}
    out_sqd, _ = flash_attn_varlen_func(*(x.squeeze(1) for x in (q_sbqd, k_tbkd, v_tbkd)), **packed, **options)
    return out_sqd.unsqueeze(1)
