"""Causal attention with grouped queries: one public function, `causal_attention`.

`reference.py` is the definition; `fused.py` hands the work to FlashAttention-4 (Dao-AILab; the method: Dao 2024, arXiv 2307.08691).
Legend: s queries, t keys, b batch, q query heads, k key/value heads, d head dimension.
"""

from torch import Tensor

from megatron_prism.kernels.causal_attention import fused, reference
from megatron_prism.kernels.choice import Impl, use_fused

__all__ = ["causal_attention"]


def causal_attention(
    q_sbqd: Tensor,
    k_tbkd: Tensor,
    v_tbkd: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    ends: Tensor | None = None,
    longest: int | None = None,
    deterministic: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """softmax(scale * q k^T) v -> [s, b, q, d] in q's type, where the last query stands at the last key and none sees a later key.

    scale: None: d ** -0.5. window: keys that a query sees, itself among them; None: all before it. ends: int32 [documents + 1] from 0, of documents
    laid end to end, each of which sees itself alone (b is 1, s is t); longest: tokens of the longest of them. Query head i uses key head
    i // (q / k). deterministic: gradients are summed in a fixed order. Errors: UserError when impl="fused" cannot do the case.
    """
    assert q_sbqd.shape[2] % k_tbkd.shape[2] == 0 and k_tbkd.shape == v_tbkd.shape
    assert ends is None or (longest is not None and q_sbqd.shape[1] == 1 and len(q_sbqd) == len(k_tbkd))
    scale = q_sbqd.shape[-1] ** -0.5 if scale is None else scale
    obstacle = None if impl == "reference" else fused.obstacle(q_sbqd)
    run = fused.attend if use_fused(impl, "causal_attention", q_sbqd, obstacle) else reference.attend
    return run(q_sbqd, k_tbkd, v_tbkd, scale, window, ends, longest, deterministic)
