"""LM head and loss on CUDA at real sizes against fp64: losses, every gradient, main_grad by each library's product, memory, no waiting for the GPU.

pytest -m gpu tests/gpu/test_gpu_linear_cross_entropy.py
"""

import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_prism.kernels.linear_cross_entropy import linear_cross_entropy, products

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
Case = dict[str, torch.Tensor]
GIB = 2**30
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""of the largest value. fp32: sums of 512 and of 131,072 terms; bf16: a logit has 8 bits, which its exponential multiplies by its size"""
MODES = {"per token": {}, "promised": {"token_weights_t"}, "unit": {"token_weights_t", "unit_gradient"}}


def case(tokens: int, hidden: int, rows: int, dtype: torch.dtype) -> Case:
    """Logits of a few units; every seventh label ignored, both ends of the vocabulary among the labels."""
    draw = torch.Generator("cuda").manual_seed(0)
    labels = torch.randint(rows, (tokens,), generator=draw, device="cuda")
    labels[1::7], labels[0], labels[-1] = -100, rows - 1, 0
    return {
        "x": torch.randn(tokens, hidden, generator=draw, device="cuda").to(dtype),
        "weight": (torch.randn(rows, hidden, generator=draw, device="cuda") * 2 / hidden**0.5).to(dtype),
        "labels": labels,
        "gradient": torch.rand(tokens, generator=draw, device="cuda") + 0.5,
    }


def truth(given: Case, scaling: float = 1.0) -> Case:
    x, weight = (given[name].double().requires_grad_() for name in ("x", "weight"))
    losses = F.cross_entropy(x @ weight.T / scaling, given["labels"], reduction="none")
    (losses * given["gradient"].double()).sum().backward()
    return {"losses": losses.detach(), "x": x.grad, "weight": weight.grad}


def promises(given: Case, mode: str) -> dict[str, Any]:
    scale = 1.0 if mode == "unit" else -2.0
    settings = {"token_weights_t": scale * given["gradient"], "unit_gradient": True}
    return {name: settings[name] for name in MODES[mode]}


def found(given: Case, mode: str, main_grad: bool = False, **settings: Any) -> Case:
    """weight: what main_grad got, or autograd."""
    x, weight = given["x"].detach().requires_grad_(), torch.nn.Parameter(given["weight"])
    if main_grad:
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(weight.shape, device="cuda"), False
    losses = linear_cross_entropy(x, weight, given["labels"], impl="fused", **promises(given, mode), **settings)
    (losses * given["gradient"]).sum().backward()
    if main_grad:
        assert weight.grad_added_to_main_grad
    return {"losses": losses.detach(), "x": x.grad, "weight": weight.main_grad if main_grad else weight.grad}


def assert_close(ours: Case, expected: Case, bound: float) -> None:
    wrong = {name: ((ours[name].double() - value).abs().max() / value.abs().max()).item() for name, value in expected.items()}
    print(wrong)
    assert max(wrong.values()) < bound, wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_every_gradient_at_a_vocabulary_of_131072(dtype):
    given = case(1024, 512, 131072, dtype)
    expected = truth(given)
    for mode in MODES:
        assert_close(found(given, mode, chunk_tokens=384), expected, BOUNDS[dtype])
    assert_close(found(given, "per token"), expected, BOUNDS[dtype])


@pytest.mark.parametrize(("tokens", "hidden", "rows"), [(1, 24, 1), (7, 24, 33), (65, 200, 49159)])
@pytest.mark.parametrize("mode", MODES)
def test_odd_sizes_and_logit_scaling(tokens, hidden, rows, mode):
    given = case(tokens, hidden, rows, torch.bfloat16)
    if rows == 1:  # the loss and its gradients are 0
        ours = found(given, mode)
        assert all(value.abs().max() < 1e-2 for value in ours.values())
        return
    assert_close(found(given, mode, logits_scaling=8.0), truth(given, 8.0), 2e-2)


@pytest.mark.parametrize("library", ["TransformerEngine", "torch", "torch without accumulation"])
@pytest.mark.parametrize("mode", MODES)
def test_main_grad_gets_the_same_by_every_librarys_product(library, mode, monkeypatch):
    if library == "TransformerEngine":
        if importlib.util.find_spec("transformer_engine") is None:
            pytest.skip("TransformerEngine is not installed")
        assert products._transformer_engine_gemm() is not None
    else:
        monkeypatch.setattr(products, "_transformer_engine_gemm", lambda: None)
    if library == "torch without accumulation":
        monkeypatch.setattr(products, "_torch_adds_wide", lambda device, dtype: False)
    given = case(700, 512, 32128, torch.bfloat16)
    assert_close(found(given, mode, main_grad=True, chunk_tokens=256), truth(given), BOUNDS[torch.bfloat16])


def test_rows_beyond_int32_are_addressed():
    """16,640 x 131,072 logits in one chunk: the last row starts behind element 2^31."""
    given = case(16640, 64, 131072, torch.bfloat16)
    ours = found(given, "promised", chunk_tokens=16640)
    last = {name: value if name == "weight" else value[-64:] for name, value in given.items()}
    expected = truth(last)
    assert_close({name: ours[name][-64:] for name in ("losses", "x")}, {name: expected[name] for name in ("losses", "x")}, 2e-2)


@pytest.mark.parametrize(("mode", "main_grad"), [("unit", True), ("per token", True), ("per token", False)])
def test_memory_beyond_inputs_and_gradients_stays_under_1_gib(mode, main_grad):
    """8,192 tokens, 131,072 rows of 4,096. Gradients: x's, and the weight's in bf16 (with main_grad it is Megatron's dummy)."""
    given = case(8192, 4096, 131072, torch.bfloat16)
    x, weight = given["x"].requires_grad_(), torch.nn.Parameter(given["weight"])
    if main_grad:
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(weight.shape, device="cuda"), False
    for attempt in range(2):  # the first also loads kernels and workspaces
        x.grad = weight.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        losses = linear_cross_entropy(x, weight, given["labels"], impl="fused", **promises(given, mode))
        forward = torch.cuda.max_memory_allocated() - before - x.nbytes * (mode != "per token")
        torch.cuda.reset_peak_memory_stats()
        losses.backward(given["gradient"])
        backward = torch.cuda.max_memory_allocated() - before - x.nbytes - weight.nbytes
        print(mode, f"main_grad {main_grad}, attempt {attempt}: forward {forward / GIB:.3f} GiB, backward {backward / GIB:.3f} GiB")
        assert max(forward, backward) < GIB
        assert forward > GIB / 8, "the logits of a chunk must show"
        del losses


@pytest.mark.parametrize("mode", MODES)
def test_neither_pass_waits_for_the_gpu(mode):
    given = case(700, 512, 32128, torch.bfloat16)
    given["x"].requires_grad_()
    weight, settings = torch.nn.Parameter(given["weight"]), promises(given, mode)
    for debug in ("default", "error"):  # the first time compiles
        torch.cuda.set_sync_debug_mode(debug)
        try:
            linear_cross_entropy(given["x"], weight, given["labels"], impl="fused", **settings).backward(given["gradient"])
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_broken_promise_fails_on_the_device():
    """In a process of its own: a device-side assertion ends CUDA there."""
    script = (
        "import torch; from megatron_prism.kernels.linear_cross_entropy import linear_cross_entropy as f\n"
        "x, w = torch.randn(8, 64, device='cuda').requires_grad_(), torch.randn(99, 64, device='cuda')\n"
        "g = torch.ones(8, device='cuda'); labels = torch.arange(8, device='cuda')\n"
        "f(x, w, labels, token_weights_t=g, impl='fused').backward(3 * g); torch.cuda.synchronize(); print('kept', flush=True)\n"
        "g[0] = 2; f(x, w, labels, token_weights_t=g, impl='fused').sum().backward(); torch.cuda.synchronize(); print('unnoticed', flush=True)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], env=dict(os.environ), capture_output=True, text=True, timeout=120, check=False)
    assert "kept" in run.stdout and "unnoticed" not in run.stdout and run.returncode != 0, run.stdout + run.stderr[-3000:]
