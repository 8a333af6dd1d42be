"""Law 6 on CUDA: the libraries' kernels against our references in fp64, outputs and every gradient; odd lengths, documents, states, poison.

    pytest -m gpu tests/gpu/test_gpu_kernels.py

Each Triton kernel is held to the smallest of its configurations (see conftest); the sums are the same in all of them.
"""

import importlib.util
import logging
import math
from typing import Any

import pytest
import torch

from megatron_prism.kernels import choice
from megatron_prism.kernels.bit_sum import bit_sum
from megatron_prism.kernels.causal_conv1d import causal_conv1d
from megatron_prism.kernels.causal_conv1d import fused as fused_conv
from megatron_prism.kernels.gated_norm import gated_norm
from megatron_prism.kernels.ssd_scan import fused as fused_scan
from megatron_prism.kernels.ssd_scan import ssd_scan

BATCH, LENGTH, HEADS, HEAD_DIM, GROUPS, STATE, CHUNK, TAPS = 2, 300, 8, 64, 2, 128, 128, 4
CHANNELS = HEADS * HEAD_DIM
Tensors = dict[str, torch.Tensor]

SCAN_BOUNDS = {torch.float32: (5e-3, 5e-3), torch.bfloat16: (2e-2, 4e-2)}
"""largest difference over largest value, and the same for the decay's and the time step's gradients, which sum over everything. fp32: the kernels
multiply in TF32, 10 bits a factor. bf16: states between chunks and gradients have 8 bits; 4e-3 and 1e-2 were measured on a model's layer"""
CONV_BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""fp32: rounding of sums of 4, and of sums over all tokens for the weight; bf16: outputs and gradients have 8 bits"""


def missing(library: str) -> bool:
    return not torch.cuda.is_available() or importlib.util.find_spec(library) is None


pytestmark = pytest.mark.gpu
needs_mamba = pytest.mark.skipif(missing("mamba_ssm"), reason="needs CUDA and mamba-ssm")
needs_conv = pytest.mark.skipif(missing("causal_conv1d"), reason="needs CUDA and causal-conv1d")


def cut_out_of_nan(tensor: torch.Tensor) -> torch.Tensor:
    """The same values as a view into memory full of NaN (8 elements before and after, as a slice of a projection has)."""
    around = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 16), math.nan, dtype=tensor.dtype, device=tensor.device)
    view = around[..., 8:-8]
    view.copy_(tensor)
    return view


def scan_inputs(dtype: torch.dtype) -> Tensors:
    draw = torch.Generator().manual_seed(0)
    sizes = {
        "x": (BATCH, LENGTH, HEADS, HEAD_DIM),
        "dt": (BATCH, LENGTH, HEADS),
        "b": (BATCH, LENGTH, GROUPS, STATE),
        "c": (BATCH, LENGTH, GROUPS, STATE),
    }
    made = {name: torch.randn(size, generator=draw).to(dtype) for name, size in sizes.items()}
    made["a"] = -torch.empty(HEADS).uniform_(1, 16, generator=draw)
    made["d"], made["dt_bias"] = torch.randn(HEADS, generator=draw), torch.randn(HEADS, generator=draw) - 4
    made["state"] = torch.randn(BATCH, HEADS, HEAD_DIM, STATE, generator=draw)
    return {name: tensor.cuda() for name, tensor in made.items()}


def run_scan(given: Tensors, **settings: Any) -> tuple[torch.Tensor, ...]:
    positional = [given[name] for name in ("x", "dt", "a", "b", "c")]
    optional = {"d_h": given["d"], "dt_bias_h": given["dt_bias"], "initial_state_bhpn": given.get("state"), "chunk_size": CHUNK}
    return ssd_scan(*positional, return_state=True, **(optional | settings))


def with_gradients(run: Any, given: Tensors, **settings: Any) -> Tensors:
    """Outputs of `run`, and gradients by input of a scalar in which every output counts with a weight of its own."""
    given = {name: tensor.detach().requires_grad_() for name, tensor in given.items()}
    outputs = run(given, **settings)
    draw = torch.Generator().manual_seed(9)
    upstream = [torch.randn(out.shape, generator=draw).to(out) for out in outputs]
    found = torch.autograd.grad(outputs, list(given.values()), upstream)
    return {"output": outputs[0], "state out": outputs[1], **dict(zip(given, found, strict=True))}


def wide(given: Tensors) -> Tensors:
    return {name: tensor.double() for name, tensor in given.items()}


def differences(found: Tensors, expected: Tensors) -> dict[str, float]:
    return {name: ((found[name].double() - value).abs().max() / value.abs().max()).item() for name, value in expected.items()}


def assert_scan_is_close(found: Tensors, expected: Tensors, dtype: torch.dtype) -> None:
    wrong = differences(found, expected)
    print(dtype, wrong)
    plain, summed = SCAN_BOUNDS[dtype]
    assert all(value < (summed if name in ("a", "dt", "dt_bias") else plain) for name, value in wrong.items()), wrong


def documents() -> torch.Tensor:
    """Three documents in the first sample, two in the second; one ends with a chunk, others inside one, one is a token long."""
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    ids[0, 128:], ids[0, 129:], ids[1, 200:] = 5, 0, 1
    return ids.cuda()


@needs_mamba
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_scan_is_the_reference_in_outputs_and_every_gradient(dtype):
    given = scan_inputs(dtype)
    limit = (0.001, 0.5)
    expected = with_gradients(run_scan, wide(given), impl="reference", time_step_limit=limit)
    assert_scan_is_close(with_gradients(run_scan, given, impl="fused", time_step_limit=limit), expected, dtype)


@needs_mamba
def test_fused_scan_keeps_documents_apart():
    given = {name: tensor for name, tensor in scan_inputs(torch.bfloat16).items() if name != "state"}
    expected = with_gradients(run_scan, wide(given), impl="reference", document_bl=documents())
    found = with_gradients(run_scan, given, impl="fused", document_bl=documents())
    assert_scan_is_close(found, expected, torch.bfloat16)
    unaware = differences(with_gradients(run_scan, given, impl="fused"), expected)
    assert unaware["state out"] > 0.05 and unaware["output"] > 0.05, unaware


@needs_mamba
@pytest.mark.parametrize("cut", [1, 150])
def test_fused_halves_chained_by_the_state_are_the_whole(cut):
    given = scan_inputs(torch.bfloat16)
    expected = run_scan(wide(given), impl="reference")
    state, parts = given["state"], []
    for span in (slice(0, cut), slice(cut, LENGTH)):
        part = {name: tensor[:, span] if name in ("x", "dt", "b", "c") else tensor for name, tensor in given.items()}
        out, state = run_scan({**part, "state": state}, impl="fused")
        parts.append(out)
    assert_scan_is_close(
        {"output": torch.cat(parts, 1), "state out": state}, dict(zip(("output", "state out"), expected, strict=True)), torch.bfloat16
    )


@needs_mamba
def test_fused_scan_never_reads_around_its_inputs():
    given = scan_inputs(torch.bfloat16)
    poisoned = {name: cut_out_of_nan(tensor) if name in ("x", "b", "c") else tensor for name, tensor in given.items()}
    clean, found = with_gradients(run_scan, given, impl="fused"), with_gradients(run_scan, poisoned, impl="fused")
    wrong = differences(found, wide(clean))
    assert max(wrong.values()) < 1e-2, wrong  # atomic sums of gradients have no fixed order


def conv_inputs(dtype: torch.dtype) -> Tensors:
    draw = torch.Generator().manual_seed(1)
    sizes = {
        "x_bld": (BATCH, LENGTH, CHANNELS),
        "weight_dk": (CHANNELS, TAPS),
        "bias_d": (CHANNELS,),
        "initial_state_bdk": (BATCH, CHANNELS, TAPS - 1),
    }
    return {name: torch.randn(size, generator=draw).to("cuda", dtype) for name, size in sizes.items()}


def run_conv(given: Tensors, **settings: Any) -> tuple[torch.Tensor, ...]:
    return causal_conv1d(**given, activation="silu", return_state=True, **settings)


@needs_conv
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_convolution_is_the_reference_in_outputs_and_every_gradient(dtype):
    given = conv_inputs(dtype)
    expected = with_gradients(run_conv, wide(given), impl="reference")
    for layout in (given, {**given, "x_bld": cut_out_of_nan(given["x_bld"])}):
        wrong = differences(with_gradients(run_conv, layout, impl="fused"), expected)
        print(dtype, wrong)
        assert max(wrong.values()) < CONV_BOUNDS[dtype], wrong


@needs_conv
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_convolution_keeps_documents_apart(dtype):
    given = {name: tensor for name, tensor in conv_inputs(dtype).items() if name != "initial_state_bdk"}
    expected = with_gradients(run_conv, wide(given), impl="reference", document_bl=documents())
    wrong = differences(with_gradients(run_conv, given, impl="fused", document_bl=documents()), expected)
    print(dtype, wrong)
    assert max(wrong.values()) < CONV_BOUNDS[dtype], wrong


@needs_conv
@pytest.mark.parametrize("length", [1, 2, 7])
def test_fused_convolution_takes_any_length_and_start(length):
    """From a slice whose start is not aligned, as a projection's rows may be cut."""
    given = conv_inputs(torch.bfloat16)
    given["x_bld"] = torch.cat([given["x_bld"], given["x_bld"]], -1)[:, :length, 3 : 3 + CHANNELS]
    expected = with_gradients(run_conv, wide(given), impl="reference")
    wrong = differences(with_gradients(run_conv, given, impl="fused"), expected)
    assert max(wrong.values()) < CONV_BOUNDS[torch.bfloat16], wrong


@needs_mamba
@needs_conv
def test_what_the_libraries_cannot_do_falls_back_and_says_so_once(caplog):
    scan, conv = scan_inputs(torch.bfloat16), conv_inputs(torch.bfloat16)
    assert fused_scan.obstacle(scan["x"], scan["state"], None) is None and fused_conv.obstacle(conv["x_bld"], conv["weight_dk"], None, None) is None
    choice._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = run_scan(scan, document_bl=documents())
            convolved = run_conv(conv, document_bl=documents())
    assert torch.equal(found[0], run_scan(scan, document_bl=documents(), impl="reference")[0])
    assert torch.equal(convolved[0], run_conv(conv, document_bl=documents(), impl="reference")[0])
    assert len(caplog.records) == 2, [record.getMessage() for record in caplog.records]


@needs_mamba
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gated_norm_kernel_is_the_reference(dtype):
    """fp32: rounding; bf16: 8 bits, and the reference rounds once more, before the weight."""
    draw = torch.Generator().manual_seed(3)
    y, z, gradient = (torch.randn(33, 2, 256, generator=draw) for _ in range(3))
    weight = 1 + 0.2 * torch.randn(256, generator=draw)
    found = {}
    for impl, kind in (("fused", dtype), ("reference", torch.float64)):
        leaves = [cut_out_of_nan(x.to("cuda", kind)).requires_grad_() for x in (y.to(dtype), z.to(dtype))]
        leaves.append(weight.to(dtype).to("cuda", kind).requires_grad_())
        out = gated_norm(*leaves, group_size=64, eps=1e-5, impl=impl)
        out.backward(gradient.to(dtype).to("cuda", kind))
        found[impl] = [out, *(leaf.grad for leaf in leaves)]
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, exact in zip(found["fused"], found["reference"], strict=True):
        assert (ours.double() - exact).abs().max() < bound * exact.abs().max()


@pytest.mark.parametrize(
    ("dtype", "count"), [(torch.bfloat16, 1), (torch.float32, 10_000_019), (torch.bfloat16, 50_000_001), (torch.uint8, 2**31 + 4099)]
)
def test_the_sum_of_bits_is_torch_s_and_sees_a_bit_at_the_end(dtype, count):
    tensor = torch.randint(-(2**63), 2**63 - 1, (count * dtype.itemsize // 8 + 1,), device="cuda").view(dtype)[:count]
    before = bit_sum([tensor, tensor[: count // 2]], impl="fused")
    assert torch.equal(before, bit_sum([tensor, tensor[: count // 2]], impl="reference"))
    tensor[-1:].view(torch.uint8)[-1:] ^= 1
    assert not torch.equal(bit_sum([tensor, tensor[: count // 2]], impl="fused"), before)
