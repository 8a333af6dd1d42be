"""Attention's reference against sums over visible keys, one query at a time: windows, packed documents, cached keys; and its gradients."""

import itertools

import pytest
import torch

from megatron_prism.errors import UserError
from megatron_prism.kernels.causal_attention import causal_attention, fused

HEADS, GROUPS, DIM = 4, 2, 8
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(queries: int, keys: int, batch: int = 1, dtype: torch.dtype = torch.float64) -> Tensors:
    draw = torch.Generator().manual_seed(0)
    sizes = ((queries, batch, HEADS, DIM), (keys, batch, GROUPS, DIM), (keys, batch, GROUPS, DIM))
    query, key, value = (torch.randn(size, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes)
    return query, key, value


def one_by_one(given: Tensors, scale: float, window: int | None, starts: list[int]) -> torch.Tensor:
    """starts: of each key, the first token of its document."""
    query, key, value = given
    past = len(key) - len(query)
    rows = []
    for place, head in itertools.product(range(len(query)), range(HEADS)):
        last = past + place
        first = max(starts[last], 0 if window is None else last - window + 1)
        group = head // (HEADS // GROUPS)
        keys, values = key[first : last + 1, :, group], value[first : last + 1, :, group]
        weights = torch.softmax(scale * (keys * query[place, :, head]).sum(-1), dim=0)
        rows.append((weights.unsqueeze(-1) * values).sum(0))
    return torch.stack(rows).view(len(query), HEADS, -1, DIM).transpose(1, 2)


@pytest.mark.parametrize(("queries", "keys", "batch"), [(11, 11, 1), (11, 11, 2), (4, 11, 2), (1, 11, 1), (1, 1, 1)])
@pytest.mark.parametrize("window", [None, 1, 3, 40])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_each_query_sees_the_keys_up_to_its_own(queries, keys, batch, window, scale):
    given = inputs(queries, keys, batch)
    found = causal_attention(*given, scale=scale, window=window)
    expected = one_by_one(given, DIM**-0.5 if scale is None else scale, window, [0] * keys)
    assert (found - expected).abs().max() < 1e-13
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    for ours, wanted in zip(torch.autograd.grad(found, given, weight), torch.autograd.grad(expected, given, weight), strict=True):
        assert (ours - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("lengths", [[11], [1, 4, 6], [5, 5, 1]])
def test_packed_documents_see_themselves_alone(lengths, window):
    given = inputs(11, 11)
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    starts = [start for start, length in zip(ends.tolist(), lengths, strict=False) for _ in range(length)]
    found = causal_attention(*given, window=window, ends=ends, longest=max(lengths))
    assert (found - one_by_one(given, DIM**-0.5, window, starts)).abs().max() < 1e-13


def test_sixteen_bits_are_computed_in_thirty_two_and_returned_as_they_came():
    given = inputs(11, 11, dtype=torch.bfloat16)
    found = causal_attention(*given)
    exact = causal_attention(*(x.double() for x in given))
    assert found.dtype == torch.bfloat16 and torch.equal(found, exact.to(torch.bfloat16))


def test_a_kernel_that_cannot_run_is_refused_by_name():
    with pytest.raises(UserError, match="causal_attention with impl='fused' cannot run here: the tensors are not on CUDA"):
        causal_attention(*inputs(3, 3), impl="fused")


def test_gpus_and_head_dimensions_that_are_not_proved_are_named():
    assert fused.device_obstacle(9, 128) is fused.device_obstacle(9, 64) is fused.device_obstacle(10, 64) is None
    assert fused.device_obstacle(8, 128) == "FlashAttention-4 is for GPUs of compute capability 9 and 10, this one has 8"
    assert fused.device_obstacle(9, 80) == "FlashAttention-4 is proved for heads of 64 and 128, these have 80"
