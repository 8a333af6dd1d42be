"""Rotary frequencies are transformers', bit for bit; tables of all lengths are megatron-core's, in one piece of memory."""

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from tiny_models import BASE, LLAMA3

from megatron_prism.engine import device
from megatron_prism.engine.rope import OneTable, inverse_frequencies
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


def test_tables_of_all_lengths_are_heads_of_one():
    device.setup("cpu")
    plain = RotaryEmbedding(8, 1.0, use_cpu_initialization=True)
    ours = RotaryEmbedding(8, 1.0, use_cpu_initialization=True)
    ours.__class__ = OneTable
    tables = [ours(length) for length in (33, 5, 1, 64, 40)]
    assert all(torch.equal(table, plain(len(table))) for table in tables)
    assert [len(table) for table in tables] == [33, 5, 1, 64, 40]
    assert len({table.untyped_storage().data_ptr() for table in tables}) == 1
    assert torch.equal(ours(100, 7), plain(100, 7))
