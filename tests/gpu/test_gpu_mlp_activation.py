"""The MLP's activations on CUDA: values and gradients against fp64, rows beyond int32, and the backward pass's share of the memory's bandwidth.

pytest -m gpu -s tests/gpu/test_gpu_mlp_activation.py
"""

from collections.abc import Callable

import pytest
import torch

from megatron_prism.kernels.mlp_activation import squared_relu, swiglu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
OURS = {"swiglu": (swiglu, 2), "squared_relu": (squared_relu, 1)}
TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""relative, of each value: half a unit in the last place of 16-bit types"""


def truth(name: str, x: torch.Tensor) -> torch.Tensor:
    if name == "squared_relu":
        return x.clamp(min=0) ** 2
    gate, up = x.chunk(2, dim=-1)
    return gate / (1 + (-gate).exp()) * up


def check(name: str, x: torch.Tensor) -> None:
    """x: a leaf. Output and gradient, for a random gradient of the output."""
    y = OURS[name][0](x, impl="fused")
    dy = torch.randn_like(y)
    exact = x.detach().double().requires_grad_()
    expected = truth(name, exact)
    gradients = torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(expected, exact, dy.double())[0]
    for found, wanted in ((y, expected), gradients):
        assert found.dtype == x.dtype
        torch.testing.assert_close(found.double(), wanted, rtol=1.05 * TOLERANCES[x.dtype], atol=1e-5)  # dgate has a zero


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 3, 1500), (64, 2, 14336)], ids=str)
def test_output_and_gradient_are_those_in_fp64(name, shape, dtype):
    torch.manual_seed(0)
    check(name, (3 * torch.randn(*shape[:-1], shape[-1] * OURS[name][1], device="cuda")).to(dtype).requires_grad_())


@pytest.mark.parametrize("name", OURS)
def test_rows_beyond_int32_are_addressed(name):
    """The third row starts at element 2^31."""
    far_apart = torch.empty(3, 2**30, dtype=torch.bfloat16, device="cuda")[:, :64]
    check(name, far_apart.normal_().requires_grad_())


@pytest.mark.parametrize("name", OURS)
def test_forward_and_backward_reach_more_than_half_of_a_copys_bandwidth(name):
    """8,192 tokens, f = 14,336, bf16."""
    run, widths = OURS[name]
    source = torch.randn(8192, 2 * 14336, device="cuda").bfloat16()
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / milliseconds(lambda: target.copy_(source))
    x = source[:, : widths * 14336].contiguous().requires_grad_()
    y = run(x, impl="fused")
    dy = torch.randn_like(y)
    forward = milliseconds(lambda: run(x, impl="fused"))
    backward = milliseconds(lambda: torch.autograd.grad(y, x, dy, retain_graph=True))
    shares = [(x.nbytes + y.nbytes) / forward / copy, (2 * x.nbytes + y.nbytes) / backward / copy]
    print(f"\n{name}: copy {copy / 1e9:.2f} TB/s; forward {forward:.3f} ms, {shares[0]:.0%} of it; backward {backward:.3f} ms, {shares[1]:.0%}")
    assert min(shares) > 0.5


def milliseconds(run: Callable[[], object]) -> float:
    """Of the GPU, for one of 50 runs in a row, after 5 that load and compile."""
    for _ in range(5):
        run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(50):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 50
