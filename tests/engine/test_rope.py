"""Rotary frequencies are transformers', bit for bit; tables of all lengths are megatron-core's, in one piece of memory."""

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from tiny_models import BASE, LLAMA3

from megatron_prism.engine import device
from megatron_prism.engine.rope import OneTable, inverse_frequencies
from megatron_prism.families.llama import LLAMA

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CASES = [
    {"rope_theta": 10_000.0},
    {"rope_theta": 500_000.0},
    {"rope_theta": 10_000.0, "rope_type": "linear", "factor": 3.0},
    {"rope_theta": 500_000.0, **LLAMA3},
    {"rope_theta": 500_000.0, **LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192},
    {"rope_theta": 500_000.0, **LLAMA3, "low_freq_factor": 2.0, "high_freq_factor": 8.0},
    {"rope_theta": 10_000.0, **YARN},
    {"rope_theta": 1_000_000.0, **YARN, "factor": 16.0, "original_max_position_embeddings": 8192},
    {"rope_theta": 10_000.0, **YARN, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False, "attention_factor": 1.5},
    {"rope_theta": 10_000.0, **YARN, "mscale": 0.7, "mscale_all_dim": 0.3},
    {"rope_theta": 10_000.0, **YARN, "original_max_position_embeddings": 7, "beta_fast": 1.2},
]


@pytest.mark.parametrize("head_dim", [10, 64, 128])
@pytest.mark.parametrize("rope", CASES)
def test_frequencies_equal_those_of_a_transformers_model(rope, head_dim):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(**{**BASE, "head_dim": head_dim, "rope_parameters": {"rope_type": "default", **rope}})
    reference = LlamaRotaryEmbedding(config)
    model = LLAMA.model_config({"model_type": "llama", **BASE, "head_dim": head_dim, "rope_parameters": rope})
    ours = inverse_frequencies(model)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, reference.inv_freq)
    # transformers multiplies queries and keys, we their product
    assert (model.attention_scale or head_dim**-0.5) == pytest.approx(head_dim**-0.5 * reference.attention_scaling**2, rel=1e-12)


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
