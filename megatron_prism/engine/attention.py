"""Our layers for where TransformerEngine is not: RMSNorm that knows sequence parallelism, and attention on torch's SDPA.

Both plug into megatron-core through its ModuleSpec (see `layer_specs`), on the CPU and on CUDA alike.
Legend: s queries, t keys (more than queries when earlier ones are cached), b batch, q query heads, k key/value heads, d head dimension; heads of
this tensor-parallel rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight, normalised in fp32 (Zhang & Sennrich 2019; rounded as transformers' LlamaRMSNorm does).

    Its weight is tagged for sequence parallelism, so that gradients of the cut sequence are summed over tensor-parallel ranks: torch's own norm,
    which megatron-core wraps, refuses sequence parallelism (torch_norm.py:32).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float | None = None, **unused: Any) -> None:
        super().__init__()
        assert config.normalization == "RMSNorm" and not config.layernorm_zero_centered_gamma
        self.eps = config.layernorm_epsilon if eps is None else eps
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x_sbh: Tensor) -> Tensor:
        """[s, b, h] -> [s, b, h] in the same dtype."""
        wide = x_sbh.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x_sbh.dtype)


class CausalAttention(MegatronModule):
    """softmax(q k^T * scale) v with a causal mask, grouped queries and, if the config asks, a sliding window, through torch's SDPA."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        assert config.context_parallel_size == 1
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self.dropout = config.attention_dropout
        self.window = None if config.window_size is None else config.window_size[0] + 1
        """keys that a query sees, itself among them"""

    def forward(
        self, q_sbqd: Tensor, k_tbkd: Tensor, v_tbkd: Tensor, attention_mask: None, packed_seq_params: PackedSeqParams | None = None, **unused: Any
    ) -> Tensor:
        """[s, b, q, d], [t, b, k, d], [t, b, k, d] -> [s, b, q * d]. The last query stands at the last key; a mask tensor is refused.

        Packed documents come without the batch axis ([s, q, d]) and leave so: each sees itself alone, padding at its end included.
        """
        assert attention_mask is None
        if packed_seq_params is None:
            return self._attend(q_sbqd, k_tbkd, v_tbkd)
        ends = packed_seq_params.cu_seqlens_q if packed_seq_params.cu_seqlens_q_padded is None else packed_seq_params.cu_seqlens_q_padded
        lengths = ends.diff().tolist()
        documents = zip(*(x.unsqueeze(1).split(lengths) for x in (q_sbqd, k_tbkd, v_tbkd)), strict=True)
        return torch.cat([self._attend(*document) for document in documents]).squeeze(1)

    def _attend(self, q_sbqd: Tensor, k_tbkd: Tensor, v_tbkd: Tensor) -> Tensor:
        s, b, q, d = q_sbqd.shape
        query, key, value = (x.permute(1, 2, 0, 3) for x in (q_sbqd, k_tbkd, v_tbkd))
        mask_st = self._mask(s, key.shape[2], query.device)
        out_bqsd = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask_st,
            is_causal=mask_st is None,
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=key.shape[1] != q,
        )
        return out_bqsd.permute(2, 0, 1, 3).reshape(s, b, q * d)

    def _mask(self, s: int, t: int, device: torch.device) -> Tensor | None:
        """[s, t], true where a query sees a key; None for the plain causal square, for which SDPA has faster paths."""
        if s == t and (self.window is None or self.window >= t):
            return None
        seen = torch.ones(s, t, dtype=torch.bool, device=device).tril(t - s)
        return seen if self.window is None else seen.triu(t - s - self.window + 1)
