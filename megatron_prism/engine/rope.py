"""Inverse frequencies of rotary embeddings, equal to transformers' (`modeling_rope_utils`), for every kind that `RopeScaling` names."""

import math

import torch
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
