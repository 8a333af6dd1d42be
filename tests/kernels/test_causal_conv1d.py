"""The short convolution's reference against torch's Conv1d and against its own sum written out."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from megatron_prism.kernels.causal_conv1d import causal_conv1d

CHANNELS = 6


def inputs(length: int, taps: int, batch: int = 2) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(length * 10 + taps)
    sizes = {
        "x_bld": (batch, length, CHANNELS),
        "weight_dk": (CHANNELS, taps),
        "bias_d": (CHANNELS,),
        "initial_state_bdk": (batch, CHANNELS, taps - 1),
    }
    return {name: torch.randn(size, generator=draw, dtype=torch.float64).requires_grad_() for name, size in sizes.items()}


def gradients(outputs: tuple[torch.Tensor, ...], given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(9)
    total = sum((torch.randn(out.shape, generator=draw, dtype=torch.float64) * out).sum() for out in outputs)
    return torch.autograd.grad(total, list(given.values()), allow_unused=True, materialize_grads=True)


def assert_equal(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("length", "taps"), [(1, 4), (2, 4), (7, 4), (65, 2), (7, 3), (7, 1)])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_reference_is_a_convolution_in_outputs_and_every_gradient(length, taps, activation):
    given = inputs(length, taps)
    known = torch.cat([given["initial_state_bdk"], given["x_bld"].transpose(1, 2)], dim=-1)
    y = F.conv1d(known, given["weight_dk"].unsqueeze(1), given["bias_d"], groups=CHANNELS)
    expected = ((F.silu(y) if activation else y).transpose(1, 2), known[..., known.shape[-1] - (taps - 1) :])
    found = causal_conv1d(**given, activation=activation, return_state=True)
    assert_equal((*found, *gradients(found, given)), (*expected, *gradients(expected, given)))


def test_without_state_and_bias_the_past_is_zero():
    given = inputs(7, 4)
    x, weight = given["x_bld"].detach(), given["weight_dk"].detach()
    expected = [[sum(weight[d, i] * x[0, t - 3 + i, d] for i in range(4) if t - 3 + i >= 0) for d in range(CHANNELS)] for t in range(7)]
    torch.testing.assert_close(causal_conv1d(x, weight)[0], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("cuts", [(1,), (5,), (2, 3, 9), (3, 6, 12)])
def test_packed_documents_are_separate_documents(cuts):
    given = inputs(13, 4)
    edges = [0, *cuts, 13]
    ids = torch.cat([torch.full((end - start,), 7 - index % 2) for index, (start, end) in enumerate(itertools.pairwise(edges))]).expand(2, -1)
    found = causal_conv1d(**given, document_bl=ids, return_state=True)
    parts, past, state = [], given["initial_state_bdk"], None
    for start, end in itertools.pairwise(edges):
        part = {**given, "x_bld": given["x_bld"][:, start:end], "initial_state_bdk": past}
        out, state = causal_conv1d(**part, return_state=True)
        parts.append(out)
        past = torch.zeros_like(past)
    expected = (torch.cat(parts, dim=1), state)
    assert_equal((*found, *gradients(found, given)), (*expected, *gradients(expected, given)))


@pytest.mark.parametrize("cut", [1, 2, 6])
def test_two_halves_chained_by_the_state_are_the_whole(cut):
    given = inputs(7, 4)
    first, state = causal_conv1d(**{**given, "x_bld": given["x_bld"][:, :cut]}, return_state=True)
    second, last = causal_conv1d(**{**given, "x_bld": given["x_bld"][:, cut:], "initial_state_bdk": state}, return_state=True)
    found, expected = (torch.cat([first, second], dim=1), last), causal_conv1d(**given, return_state=True)
    assert_equal((*found, *gradients(found, given)), (*expected, *gradients(expected, given)))


def test_memory_around_the_inputs_is_never_read():
    given = {name: tensor.detach() for name, tensor in inputs(7, 4).items()}
    poisoned = {}
    for name, tensor in given.items():
        around = torch.full([size + 4 for size in tensor.shape], math.nan, dtype=tensor.dtype)
        poisoned[name] = around[tuple(slice(1, size + 1) for size in tensor.shape)].copy_(tensor)
    assert_equal(causal_conv1d(**poisoned, return_state=True), causal_conv1d(**given, return_state=True))


def test_half_precision_is_summed_in_fp32():
    given = {name: tensor.detach().bfloat16() for name, tensor in inputs(65, 4).items()}
    wide = {name: tensor.double() for name, tensor in given.items()}
    found = causal_conv1d(**given)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), causal_conv1d(**wide), rtol=2**-8, atol=1e-6)  # half of bf16's last bit: one rounding, at the end
