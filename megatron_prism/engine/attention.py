"""Our layers for where TransformerEngine is not: RMSNorm that knows sequence parallelism, and attention on torch's SDPA.

Both plug into megatron-core through its ModuleSpec (see `layer_specs`), on the CPU and on CUDA alike. Under context parallelism every rank gathers
all keys and values of its heads, and attends with its own queries.
Legend: s queries, t keys (more than queries when earlier ones are cached), b batch, q query heads, k key/value heads, d head dimension; heads of
this tensor-parallel rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_prism.engine.context_parallel import chunks, gather
from megatron_prism.engine.documents import lengths_of

WINDOWED_QUERIES = 1024
"""queries that a sliding window handles at once, at least"""


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
        self.weight.sequence_parallel = config.sequence_parallel

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
        pg_collection: ProcessGroupCollection | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.cp, self.cp_group = config.context_parallel_size, None if pg_collection is None else pg_collection.cp
        assert self.cp == 1 or self.cp_group is not None
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
            return self._attend(q_sbqd, k_tbkd, v_tbkd) if self.cp == 1 else self._attend_by_chunks(q_sbqd, k_tbkd, v_tbkd, None)
        q_sbqd, k_tbkd, v_tbkd = (x.unsqueeze(1) for x in (q_sbqd, k_tbkd, v_tbkd))
        return self._attend_by_chunks(q_sbqd, k_tbkd, v_tbkd, packed_seq_params).squeeze(1)

    def _attend_by_chunks(self, q_sbqd: Tensor, k_tbkd: Tensor, v_tbkd: Tensor, packed: PackedSeqParams | None) -> Tensor:
        """Each chunk of a document that this rank holds, over the document's keys up to the chunk's end, wherever they are held."""
        rank = 0
        if self.cp_group is not None and self.cp > 1:
            rank = self.cp_group.rank()
            k_tbkd, v_tbkd = gather(torch.cat([k_tbkd, v_tbkd], dim=-1), packed, self.cp_group).chunk(2, dim=-1)
        lengths = [k_tbkd.shape[0]] if packed is None else lengths_of(packed)
        held = chunks(lengths, self.cp, rank)
        queries = q_sbqd.split([chunk.stop - chunk.start for chunk in held])
        seen = [slice(chunk.document, chunk.stop) for chunk in held]
        return torch.cat([self._attend(q, k_tbkd[keys], v_tbkd[keys]) for q, keys in zip(queries, seen, strict=True)])

    def _attend(self, q_sbqd: Tensor, k_tbkd: Tensor, v_tbkd: Tensor) -> Tensor:
        s, b, q, d = q_sbqd.shape
        query, key, value = (x.permute(1, 2, 0, 3) for x in (q_sbqd, k_tbkd, v_tbkd))
        out_bqsd = torch.cat([self._block(query, key, value, start, stop) for start, stop in self._blocks(s, key.shape[2])], dim=2)
        return out_bqsd.permute(2, 0, 1, 3).reshape(s, b, q * d)

    def _blocks(self, s: int, t: int) -> list[tuple[int, int]]:
        """Ranges of queries: all at once, or, under a window, a few windows each, so that masks grow with the length and not with its square."""
        if self.window is None or self.window >= t:
            return [(0, s)]
        size = max(self.window, WINDOWED_QUERIES)
        return [(start, min(start + size, s)) for start in range(0, s, size)]

    def _block(self, query: Tensor, key: Tensor, value: Tensor, start: int, stop: int) -> Tensor:
        """Queries [start, stop) over the keys that any of them sees -> [b, q, stop - start, d]."""
        past = key.shape[2] - query.shape[2]
        high = past + stop
        low = 0 if self.window is None else max(past + start - self.window + 1, 0)
        mask = None
        if past + start or (self.window is not None and self.window < high):  # not the plain causal square, for which SDPA has faster paths
            mask = torch.ones(stop - start, high - low, dtype=torch.bool, device=query.device).tril(past + start - low)
            mask = mask if self.window is None else mask.triu(past + start - low - self.window + 1)
        return F.scaled_dot_product_attention(
            query[:, :, start:stop],
            key[:, :, low:high],
            value[:, :, low:high],
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=key.shape[1] != query.shape[1],
        )
