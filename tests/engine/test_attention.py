"""A sliding window computed in blocks of queries is the whole masked softmax; with cached keys too, and for one context-parallel rank."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_prism.engine import attention
from megatron_prism.engine.context_parallel import chunks
from megatron_prism.engine.documents import documents


def core_attention(window: int | None, cp: int = 1, rank: int = 0) -> attention.CausalAttention:
    config = SimpleNamespace(
        context_parallel_size=cp, kv_channels=8, attention_dropout=0.0, window_size=None if window is None else (window - 1, 0), fp8=None, fp4=None
    )
    groups = SimpleNamespace(cp=SimpleNamespace(rank=lambda: rank))
    return attention.CausalAttention(config, 1, None, "self", pg_collection=groups)


@pytest.mark.parametrize("window", [None, 1, 5, 12, 36])
@pytest.mark.parametrize(("queries", "keys"), [(23, 23), (5, 23), (1, 23), (9, 9)])
@pytest.mark.parametrize("block", [1, 4, 16])
def test_blocks_of_queries_give_the_whole_masked_softmax(monkeypatch, window, queries, keys, block):
    monkeypatch.setattr(attention, "WINDOWED_QUERIES", block)
    core = core_attention(window)
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


@pytest.mark.parametrize("window", [None, 1, 5, 12])
@pytest.mark.parametrize(("cp", "lengths"), [(2, [24]), (4, [24]), (2, [8, 4, 12]), (4, [16, 8])])
def test_a_rank_attends_with_its_own_tokens_over_all_keys(monkeypatch, window, cp, lengths):
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(24, 1, 4, 8, generator=draw)
    key, value = (torch.randn(24, 1, 2, 8, generator=draw) for _ in range(2))
    packed = None if len(lengths) == 1 else documents(torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32), tuple(lengths))
    squeezed = [x if packed is None else x.squeeze(1) for x in (query, key, value)]
    expected = core_attention(window)(*squeezed, None, packed_seq_params=packed)
    for rank in range(cp):
        held = torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in chunks(lengths, cp, rank)])
        monkeypatch.setattr(attention, "gather", lambda part, packed, group: torch.cat([key, value], dim=-1))
        found = core_attention(window, cp, rank)(*(x[held] for x in squeezed), None, packed_seq_params=packed)
        assert torch.allclose(found, expected[held], atol=1e-6)
