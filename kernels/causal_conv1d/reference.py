"""The definition of `causal_conv1d` in plain torch: one shifted product for each tap.

Legend: b batch, l length, d channels, k taps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_prism.kernels.choice import compute_dtype, document_runs


def convolve(
    x_bld: Tensor, weight_dk: Tensor, bias_d: Tensor | None, activation: str | None, document_bl: Tensor | None, initial_state_bdk: Tensor | None
) -> Tensor:
    """`causal_conv1d` -> y in x's type."""
    wide, length, taps = compute_dtype(x_bld), x_bld.shape[1], weight_dk.shape[1]
    weight = weight_dk.to(wide)
    x = _with_past(x_bld, taps, initial_state_bdk).to(wide)
    # inputs before the first belong to the first document
    runs = None if document_bl is None else F.pad(document_runs(document_bl), (taps - 1, 0))
    y = torch.zeros_like(x[:, :length])
    for tap in range(taps):
        shifted = x[:, tap : tap + length] * weight[:, tap]
        if runs is not None:
            shifted = shifted.masked_fill((runs[:, tap : tap + length] != runs[:, taps - 1 :]).unsqueeze(-1), 0.0)
        y = y + shifted
    if bias_d is not None:
        y = y + bias_d.to(wide)
    return (F.silu(y) if activation == "silu" else y).to(x_bld.dtype)


def last_inputs(x_bld: Tensor, taps: int, document_bl: Tensor | None, initial_state_bdk: Tensor | None) -> Tensor:
    """The last k - 1 inputs [b, d, k - 1]: zero for other documents than the last, from the initial state where the length is less."""
    past = taps - 1
    start = max(x_bld.shape[1] - past, 0)
    known_bld = _with_past(x_bld[:, start:], taps, initial_state_bdk)[:, x_bld.shape[1] - start :]
    if document_bl is not None:
        runs = F.pad(document_runs(document_bl), (past, 0))[:, document_bl.shape[1] :]
        known_bld = known_bld.masked_fill((runs != runs[:, -1:]).unsqueeze(-1), 0.0)
    return known_bld.transpose(1, 2)


def _with_past(x_bld: Tensor, taps: int, initial_state_bdk: Tensor | None) -> Tensor:
    """x with the k - 1 inputs before it."""
    if initial_state_bdk is None:
        return F.pad(x_bld, (0, 0, taps - 1, 0))
    return torch.cat([initial_state_bdk.transpose(1, 2).to(x_bld.dtype), x_bld], dim=1)
