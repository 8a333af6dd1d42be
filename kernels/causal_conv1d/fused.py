"""`causal_conv1d` on the library of that name (1.5 to 1.7).

Owns: what its kernels cannot do (`obstacle`), and the layout that they expect: channels last, with starts and strides of 8 elements.
"""

import importlib.util

import torch
from torch import Tensor

from megatron_prism.kernels.choice import document_runs

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def obstacle(x_bld: Tensor, weight_dk: Tensor, initial_state_bdk: Tensor | None, document_bl: Tensor | None) -> str | None:
    """Why the library cannot do this case; None if it can."""
    if not x_bld.is_cuda:
        return "the tensors are not on CUDA"
    if importlib.util.find_spec("causal_conv1d") is None:
        return "causal-conv1d is not installed (pip install megatron-prism[gpu])"
    if torch.are_deterministic_algorithms_enabled():
        return "causal-conv1d adds up the taps' gradients in no fixed order, and deterministic sums were asked for"
    if x_bld.dtype not in TYPES or weight_dk.dtype not in TYPES:
        return f"causal-conv1d does not compute in {x_bld.dtype}"
    if not 2 <= weight_dk.shape[1] <= 4:
        return f"causal-conv1d takes 2 to 4 taps, not {weight_dk.shape[1]}"
    if x_bld.shape[2] % 8:
        return f"causal-conv1d takes multiples of 8 channels, not {x_bld.shape[2]}"
    if initial_state_bdk is not None and document_bl is not None:
        return "causal-conv1d takes documents or an initial state, not both"
    return None


def convolve(
    x_bld: Tensor, weight_dk: Tensor, bias_d: Tensor | None, activation: str | None, document_bl: Tensor | None, initial_state_bdk: Tensor | None
) -> Tensor:
    """`causal_conv1d` -> y in x's type."""
    from causal_conv1d import causal_conv1d_fn

    y_bdl = causal_conv1d_fn(
        _aligned(x_bld).transpose(1, 2),
        weight_dk.contiguous(),
        None if bias_d is None else bias_d.to(weight_dk.dtype),
        seq_idx=None if document_bl is None else document_runs(document_bl).int().contiguous(),
        # channels last, as x
        initial_states=None if initial_state_bdk is None else initial_state_bdk.to(x_bld.dtype).transpose(1, 2).contiguous().transpose(1, 2),
        activation=activation,
    )
    return y_bdl.transpose(1, 2)


def _aligned(x_bld: Tensor) -> Tensor:
    """x itself where the kernels' loads of 8 elements fit its layout, else a copy."""
    fits = x_bld.stride(2) == 1 and x_bld.stride(0) % 8 == 0 and x_bld.stride(1) % 8 == 0 and x_bld.data_ptr() % 16 == 0
    return x_bld if fits else x_bld.contiguous()
