"""Rotary frequencies are transformers', bit for bit."""

import pytest
import torch
from tiny_models import BASE, LLAMA3

from megatron_prism.engine.rope import inverse_frequencies
from megatron_prism.families.llama import LLAMA

CASES = [
    {"rope_theta": 10_000.0},
    {"rope_theta": 500_000.0},
    {"rope_theta": 10_000.0, "rope_type": "linear", "factor": 3.0},
    {"rope_theta": 500_000.0, **LLAMA3},
    {"rope_theta": 500_000.0, **LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192},
    {"rope_theta": 500_000.0, **LLAMA3, "low_freq_factor": 2.0, "high_freq_factor": 8.0},
]


@pytest.mark.parametrize("head_dim", [10, 64, 128])
@pytest.mark.parametrize("rope", CASES)
def test_frequencies_equal_those_of_a_transformers_model(rope, head_dim):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(**{**BASE, "head_dim": head_dim, "rope_parameters": {"rope_type": "default", **rope}})
    reference = LlamaRotaryEmbedding(config).inv_freq
    ours = inverse_frequencies(LLAMA.model_config({"model_type": "llama", **BASE, "head_dim": head_dim, "rope_parameters": rope}))
    assert ours.dtype == torch.float32
    assert torch.equal(ours, reference)
