"""Our layers for where TransformerEngine is not: RMSNorm that knows sequence parallelism, and attention on torch's SDPA.

Both plug into megatron-core through its ModuleSpec (see `model.layer_spec`), on the CPU and on CUDA alike.
Legend: s sequence, b batch, q query heads, k key/value heads, d head dimension (all of this tensor-parallel rank).
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight, normalised in fp32 (Zhang & Sennrich 2019; rounded as transformers' LlamaRMSNorm does).

    Its weight is tagged for sequence parallelism, so that gradients of the cut sequence are summed over tensor-parallel ranks: torch's own norm,
    which megatron-core wraps, refuses sequence parallelism (torch_norm.py:32).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        assert config.normalization == "RMSNorm" and not config.layernorm_zero_centered_gamma
        self.eps = eps
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x_sbh: Tensor) -> Tensor:
        """[s, b, h] -> [s, b, h] in the same dtype."""
        wide = x_sbh.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x_sbh.dtype)


class CausalAttention(MegatronModule):
    """softmax(q k^T * scale) v with a causal mask and grouped queries, through torch's scaled_dot_product_attention."""

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

    def forward(self, q_sbqd: Tensor, k_sbkd: Tensor, v_sbkd: Tensor, attention_mask: None, packed_seq_params: None = None, **unused: Any) -> Tensor:
        """[s, b, q, d], [s, b, k, d], [s, b, k, d] -> [s, b, q * d]. The mask is always causal; a mask tensor is refused."""
        assert attention_mask is None and packed_seq_params is None
        s, b, q, d = q_sbqd.shape
        query, key, value = (x.permute(1, 2, 0, 3) for x in (q_sbqd, k_sbkd, v_sbkd))
        out_bqsd = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.scale, dropout_p=self.dropout if self.training else 0.0, enable_gqa=key.shape[1] != q
        )
        return out_bqsd.permute(2, 0, 1, 3).reshape(s, b, q * d)
