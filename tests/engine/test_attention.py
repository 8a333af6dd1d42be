"""A sliding window computed in blocks of queries is the whole masked softmax; with cached keys too."""

from types import SimpleNamespace

import pytest
import torch

from megatron_prism.engine import attention


@pytest.mark.parametrize("window", [None, 1, 5, 12, 36])
@pytest.mark.parametrize(("queries", "keys"), [(23, 23), (5, 23), (1, 23), (9, 9)])
@pytest.mark.parametrize("block", [1, 4, 16])
def test_blocks_of_queries_give_the_whole_masked_softmax(monkeypatch, window, queries, keys, block):
    monkeypatch.setattr(attention, "WINDOWED_QUERIES", block)
    config = SimpleNamespace(
        context_parallel_size=1, kv_channels=8, attention_dropout=0.0, window_size=None if window is None else (window - 1, 0), fp8=None, fp4=None
    )
    core = attention.CausalAttention(config, 1, None, "self")
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(queries, 2, 4, 8, generator=draw)
    key, value = (torch.randn(keys, 2, 2, 8, generator=draw) for _ in range(2))
    found = core(query, key, value, None)
    place, other = torch.arange(keys - queries, keys).unsqueeze(1), torch.arange(keys)
    seen = (other <= place) & (other > place - (window or keys))
    scores = torch.einsum("sbqd,tbqd->bqst", query, key.repeat_interleave(2, dim=2)) * 8**-0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    expected = torch.einsum("bqst,tbqd->sbqd", weights, value.repeat_interleave(2, dim=2)).flatten(2)
    assert torch.allclose(found, expected, atol=1e-6)
