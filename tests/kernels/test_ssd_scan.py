"""The scan's reference against the recurrence itself, one token at a time: outputs, every gradient, documents, states, poisoned memory."""

import itertools
import logging
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import triton

from megatron_prism.errors import UserError
from megatron_prism.kernels import choice
from megatron_prism.kernels.ssd_scan import fused, ssd_scan

Inputs = dict[str, torch.Tensor]
HEADS, HEAD_DIM, STATE = 4, 3, 5


def inputs(length: int, groups: int = 2, batch: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0) -> Inputs:
    draw = torch.Generator().manual_seed(seed)
    sizes = {
        "x": (batch, length, HEADS, HEAD_DIM),
        "dt": (batch, length, HEADS),
        "a": (HEADS,),
        "b": (batch, length, groups, STATE),
        "c": (batch, length, groups, STATE),
        "d": (HEADS,),
        "dt_bias": (HEADS,),
        "state": (batch, HEADS, HEAD_DIM, STATE),
    }
    made = {name: torch.randn(size, generator=draw, dtype=torch.float64) for name, size in sizes.items()}
    made["a"] = -made["a"].exp()
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in made.items()}


def scan(given: Inputs, chunk_size: int = 4, **settings: object) -> tuple[torch.Tensor, torch.Tensor]:
    positional = [given[name] for name in ("x", "dt", "a", "b", "c")]
    optional = {"d_h": given["d"], "dt_bias_h": given["dt_bias"], "initial_state_bhpn": given.get("state")}
    return ssd_scan(*positional, chunk_size=chunk_size, return_state=True, **(optional | settings))


def recurrence(given: Inputs, limit: tuple[float, float] = (0.0, math.inf)) -> tuple[torch.Tensor, torch.Tensor]:
    """h = exp(step a) h + step x B^T; y = C h + D x: token by token, head by head."""
    state, ys = given["state"], []
    shared = HEADS // given["b"].shape[2]
    for token in range(given["x"].shape[1]):
        step = torch.clamp(F.softplus(given["dt"][:, token] + given["dt_bias"]), *limit)
        heads, y = [], []
        for head in range(HEADS):
            b, c = given["b"][:, token, head // shared], given["c"][:, token, head // shared]
            x, now = given["x"][:, token, head], step[:, head, None]
            kept = torch.exp(now * given["a"][head]).unsqueeze(-1) * state[:, head]
            heads.append(kept + (now * x).unsqueeze(-1) * b.unsqueeze(1))
            y.append((heads[-1] * c.unsqueeze(1)).sum(-1) + given["d"][head] * x)
        state = torch.stack(heads, 1)
        ys.append(torch.stack(y, 1))
    return torch.stack(ys, 1), state


def gradients(outputs: tuple[torch.Tensor, torch.Tensor], given: Inputs) -> list[torch.Tensor]:
    """Of a scalar in which every output counts with a weight of its own."""
    draw = torch.Generator().manual_seed(9)
    total = sum((torch.randn(out.shape, generator=draw, dtype=torch.float64) * out).sum() for out in outputs)
    return list(torch.autograd.grad(total, list(given.values())))


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor], bound: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= bound * other.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize(("length", "groups", "chunk_size"), [(1, 1, 4), (7, 2, 4), (7, 4, 7), (8, 1, 4), (65, 2, 16), (65, 4, 128)])
def test_reference_is_the_recurrence_in_outputs_and_every_gradient(length, groups, chunk_size):
    given = inputs(length, groups)
    found, expected = scan(given, chunk_size), recurrence(given)
    assert_equal([*found, *gradients(found, given)], [*expected, *gradients(expected, given)], 1e-11)


def test_steps_are_held_between_their_limits():
    given, limit = inputs(7), (0.3, 1.1)
    found, expected = scan(given, time_step_limit=limit), recurrence(given, limit)
    assert_equal([*found, *gradients(found, given)], [*expected, *gradients(expected, given)], 1e-11)
    free = scan(given)
    assert (free[0] - found[0]).abs().max() > 1e-2


def test_single_and_half_precision_are_computed_in_fp32():
    wide = inputs(65)
    expected = scan(wide, 16)
    for dtype, bound in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2)):  # bf16: inputs and output carry 8 bits, sums do not lose more
        given = {name: tensor.detach().to(dtype) for name, tensor in wide.items()}
        y, state = scan(given, 16)
        assert y.dtype == dtype and state.dtype == torch.float32
        assert_equal([y.double(), state.double()], [tensor.detach() for tensor in expected], bound)


def test_long_decays_keep_their_digits_in_fp32():
    """A running sum of 300 steps of -16 x 0.1 ends in 1e-5 of rounding error; what is left of a token one step later must not have it.

    Measured 7.5e-8, and 1.4e-6 with sums in fp32.
    """
    given = inputs(300, dtype=torch.float32)
    given = {**given, "a": torch.full((HEADS,), -16.0), "dt": torch.full_like(given["dt"], math.log(math.expm1(0.1))), "dt_bias": torch.zeros(HEADS)}
    wide = {name: tensor.detach().double() for name, tensor in given.items()}
    assert_equal([scan(given, 300)[0].double()], [scan(wide, 300)[0]], 3e-7)


@pytest.mark.parametrize("cuts", [(3,), (4, 8), (1, 2, 3, 10)])
def test_packed_documents_are_separate_documents(cuts):
    given = inputs(13)
    edges = [0, *cuts, 13]
    # ids need be neither sorted nor unique: two documents apart may share one
    ids = torch.cat([torch.full((end - start,), 7 - index % 2) for index, (start, end) in enumerate(itertools.pairwise(edges))]).expand(2, -1)
    y, state = scan(given, document_bl=ids)
    parts, last, first = [], None, given["state"]
    for start, end in itertools.pairwise(edges):
        part = {name: tensor[:, start:end] if name in ("x", "dt", "b", "c") else tensor for name, tensor in given.items()}
        out, last = scan({**part, "state": first}, 3)
        parts.append(out)
        first = torch.zeros_like(first)
    expected = (torch.cat(parts, 1), last)
    assert_equal([y, state, *gradients((y, state), given)], [*expected, *gradients(expected, given)], 1e-11)


def test_two_halves_chained_by_the_state_are_the_whole():
    given = inputs(13)
    halves = []
    for span in (slice(0, 6), slice(6, 13)):
        part = {name: tensor[:, span] if name in ("x", "dt", "b", "c") else tensor for name, tensor in given.items()}
        halves.append(scan({**part, "state": halves[-1][1] if halves else given["state"]}))
    found, expected = (torch.cat([halves[0][0], halves[1][0]], 1), halves[1][1]), scan(given)
    assert_equal([*found, *gradients(found, given)], [*expected, *gradients(expected, given)], 1e-11)


def test_memory_around_the_inputs_is_never_read():
    given = {name: tensor.detach() for name, tensor in inputs(7).items()}

    def cut_out_of_nan(tensor: torch.Tensor) -> torch.Tensor:
        around = torch.full([size + 4 for size in tensor.shape], math.nan, dtype=tensor.dtype)
        view = around[tuple(slice(1, size + 1) for size in tensor.shape)]
        return view.copy_(tensor)

    poisoned = {name: cut_out_of_nan(tensor).requires_grad_() for name, tensor in given.items()}
    clean = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
    found, expected = scan(poisoned), scan(clean)
    assert_equal([*found, *gradients(found, poisoned)], [*expected, *gradients(expected, clean)], 1e-12)


def test_memory_grows_with_length_times_chunk():
    """Bytes that a backward pass keeps: four times the length is four times the memory, not sixteen."""

    def kept(length: int) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.nbytes), lambda nothing: None):
            scan(inputs(length), 16)
        return sum(sizes)

    assert kept(512) < 4.4 * kept(128)


def test_a_kernel_that_cannot_run_is_refused_by_name_and_a_fallback_is_told_once(caplog):
    given = inputs(7)
    with pytest.raises(UserError, match=r"ssd_scan with impl='fused' cannot run here: the tensors are not on CUDA"):
        scan(given, impl="fused")

    class OnCuda:
        is_cuda = True

    choice._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not any(choice.use_fused("auto", "ssd_scan", OnCuda(), "no library") for _ in range(3))  # type: ignore[arg-type]
    assert [record.getMessage() for record in caplog.records] == ["ssd_scan runs its plain torch reference, slower and with more memory: no library"]


def test_where_sums_have_a_fixed_order_each_kernel_runs_in_its_smallest_tiles(monkeypatch):
    """Triton's own tuned kernels; mamba-ssm, whose kernels they stand for, needs a GPU."""

    def kernel_ptr(x_ptr, BLOCK_SIZE_M, BLOCK_SIZE_N): ...  # noqa: N803

    def config(m: int, n: int, stages: int) -> triton.Config:
        return triton.Config({"BLOCK_SIZE_M": m, "BLOCK_SIZE_N": n, "OTHER": 1}, num_stages=stages, num_warps=4)

    configs = [config(64, 64, 3), config(16, 64, 5), config(32, 32, 4), config(64, 16, 4), config(16, 64, 4)]
    tuned = triton.autotune(configs=list(configs), key=["x_ptr"])(triton.jit(kernel_ptr))
    plain = triton.jit(kernel_ptr)
    module = SimpleNamespace(tuned=tuned, plain=plain, configs=configs)
    monkeypatch.setattr(fused, "modules", lambda: [module])
    fused.hold_tiles.__wrapped__()
    assert tuned.configs == [configs[2]] and len(configs) == 5
    assert fused.tuned_kernels([module]) == []
