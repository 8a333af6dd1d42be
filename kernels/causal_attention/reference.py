"""`causal_attention` as it is defined: all scores at once, which takes memory with the square of the length."""

import torch
from torch import Tensor

from megatron_prism.kernels.choice import compute_dtype


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
    """`causal_attention`; one way of summing, so always deterministic."""
    wide = compute_dtype(q_sbqd)
    groups = q_sbqd.shape[2] // k_tbkd.shape[2]
    query, key, value = (x.to(wide).permute(1, 2, 0, 3) for x in (q_sbqd, k_tbkd, v_tbkd))
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores_bqst = scale * query @ key.transpose(-1, -2)
    seen = visible(len(q_sbqd), len(k_tbkd), window, ends, q_sbqd.device)
    weights_bqst = scores_bqst.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    return (weights_bqst @ value).permute(2, 0, 1, 3).to(q_sbqd.dtype)


def visible(s: int, t: int, window: int | None, ends: Tensor | None, device: torch.device) -> Tensor:
    """Which keys a query sees: bool [s, t]."""
    query, key = torch.arange(t - s, t, device=device).unsqueeze(1), torch.arange(t, device=device)
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    if ends is not None:
        document = torch.searchsorted(ends[1:].contiguous(), torch.arange(t, device=device), right=True)
        seen &= document.unsqueeze(1) == document
    return seen
