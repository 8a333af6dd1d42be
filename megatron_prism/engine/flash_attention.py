"""FlashAttention-4 as the core of megatron-core's attention, beside TransformerEngine's other layers.

Owns: when it runs in place of TransformerEngine's choice (cuDNN): asked for by name, or where it was measured to be faster (Hopper), is installed
and can do the case; and saying which of the two runs. Legend as in `attention`.
"""

import logging
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_prism.engine.documents import lengths_of, segment_ends
from megatron_prism.errors import UserError
from megatron_prism.kernels.causal_attention import causal_attention, fused

logger = logging.getLogger(__name__)

AttentionBackend = Literal["auto", "flash", "fused"]
MEASURED = 9
"""major compute capability of the GPUs on which it was measured to be faster than cuDNN (docs/benchmarks.md)"""


class FlashAttention(MegatronModule):
    """softmax(q k^T * scale) v with a causal mask, grouped queries and, if the config asks, a sliding window."""

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
        assert config.context_parallel_size == 1 and config.attention_dropout == 0.0
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self.window = None if config.window_size is None else config.window_size[0] + 1

    def forward(
        self, q_sbqd: Tensor, k_tbkd: Tensor, v_tbkd: Tensor, attention_mask: None, packed_seq_params: PackedSeqParams | None = None, **unused: Any
    ) -> Tensor:
        """[s, b, q, d], [t, b, k, d], [t, b, k, d] -> [s, b, q * d]. The last query stands at the last key; a mask tensor is refused.

        Packed documents come without the batch axis ([s, q, d]) and leave so: each sees itself alone, padding at its end included.
        """
        assert attention_mask is None
        packed = packed_seq_params is not None
        if packed:
            q_sbqd, k_tbkd, v_tbkd = (x.unsqueeze(1) for x in (q_sbqd, k_tbkd, v_tbkd))
        out_sbqd = causal_attention(
            q_sbqd,
            k_tbkd,
            v_tbkd,
            scale=self.scale,
            window=self.window,
            ends=None if packed_seq_params is None else segment_ends(packed_seq_params),
            longest=None if packed_seq_params is None else max(lengths_of(packed_seq_params)),
            deterministic=self.config.deterministic_mode,
        )
        return out_sbqd.squeeze(1).flatten(1) if packed else out_sbqd.flatten(2)


def uses_flash(backend: AttentionBackend, head_dim: int, cp: int, bf16: bool, transformer_engine: bool, device: torch.device) -> bool:
    """Whether layers take it. Errors: UserError when it was asked for by name and cannot run."""
    if backend == "fused" or (backend == "auto" and not transformer_engine):
        return False
    obstacle = _obstacle(head_dim, cp, bf16, transformer_engine, device)
    if backend == "flash" and obstacle is not None:
        raise UserError(f"attention_backend=flash cannot run here: {obstacle}; use attention_backend=auto")
    if backend == "auto":
        obstacle = obstacle or _unmeasured(device)
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.info("attention runs on %s", "FlashAttention-4" if obstacle is None else f"cuDNN, not on FlashAttention-4: {obstacle}")
    return obstacle is None


def _obstacle(head_dim: int, cp: int, bf16: bool, transformer_engine: bool, device: torch.device) -> str | None:
    if not transformer_engine:
        return "the layers are not TransformerEngine's (layers=transformer_engine, on CUDA)"
    if cp > 1:
        return f"parallel.cp={cp}, and TransformerEngine's attention alone exchanges keys and values"
    if not bf16:
        return "precision=fp32, and its kernels compute in 16 bits"
    return fused.missing() or fused.device_obstacle(_capability(device), head_dim)


def _unmeasured(device: torch.device) -> str | None:
    found = _capability(device)
    return None if found == MEASURED else f"on compute capability {found} nobody measured which is faster (attention_backend=flash takes it)"


def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]
