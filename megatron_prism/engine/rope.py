"""Inverse frequencies of rotary embeddings, equal to transformers' (`modeling_rope_utils`), for every kind that `RopeScaling` names; and one table
of angles for all lengths of packed documents.
"""

import math

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from megatron_prism.families.model_config import ModelConfig, RopeScaling


def inverse_frequencies(model: ModelConfig) -> Tensor:
    """Angle per position of each pair of channels: float32 [kv_channels / 2], on the CPU."""
    exponents = torch.arange(0, model.kv_channels, 2, dtype=torch.int64, device="cpu").float() / model.kv_channels
    frequencies = 1.0 / (model.rotary_base**exponents)
    scaling = model.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "yarn":
        return _yarn(model, scaling, exponents)
    assert scaling.kind == "llama3", scaling.kind
    return _llama3(frequencies, scaling)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Long waves are stretched by `factor`, short ones kept, those between interpolated (Llama 3.1; operations in transformers' order)."""
    context = scaling.original_max_position_embeddings
    longest, shortest = context / scaling.low_freq_factor, context / scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    stretched = torch.where(wavelengths > longest, frequencies / scaling.factor, frequencies)
    share_kept = (context / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    mixed = (1 - share_kept) * stretched / scaling.factor + share_kept * stretched
    between = (wavelengths >= shortest) & (wavelengths <= longest)
    return torch.where(between, mixed, stretched)


def _yarn(model: ModelConfig, scaling: RopeScaling, exponents: Tensor) -> Tensor:
    """Channels that turn often are kept, those that turn seldom stretched by `factor`, with a ramp between (operations in transformers' order)."""
    size, wavelengths = model.kv_channels, model.rotary_base**exponents

    def channel(turns: float) -> float:
        """Where a wave turns this often in the original length."""
        return size * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(model.rotary_base))

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = (torch.arange(size // 2, dtype=torch.float32, device="cpu") - low) / (high - low if high != low else 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return 1.0 / (scaling.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


class OneTable(RotaryEmbedding):
    """megatron-core's rotary embedding, whose shorter tables are the head of one long one.

    It keeps the tables of its last 32 lengths; packed documents bring another longest length each time, and 32 tables of 131,072 positions are 2 GiB.
    """

    _table: Tensor | None = None

    def get_emb(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Angles [max_seq_len, 1, 1, d]; a longer table is made to the next power of two."""
        if offset:
            return super().get_emb(max_seq_len, offset)
        if self._table is None or len(self._table) < max_seq_len:
            self._table = super().get_emb(1 << (max_seq_len - 1).bit_length())
        return self._table[:max_seq_len]
