"""Law 6 for AdamW: the definition against torch's own in fp64, and the Triton kernel in the interpreter against the definition."""

import pytest
import torch
from triton_checks import INTERPRETED, compiled_for_hopper, passes_in_the_interpreter

from megatron_prism.errors import UserError
from megatron_prism.kernels.adamw import Hyperparameters, adamw, join, split

SIZES = (1, 7, 1024, 3001)
STEPS = 4


def settings(step: int) -> Hyperparameters:
    return Hyperparameters(lr=3e-2 / step, betas=(0.9, 0.999), eps=1e-10, weight_decay=0.1, step=step)


def gradients(size: int) -> list[torch.Tensor]:
    torch.manual_seed(size)
    return [torch.randn(size) * 10.0 ** torch.randint(-6, 3, (size,)) for _ in range(STEPS)]


def poisoned(values: torch.Tensor) -> torch.Tensor:
    """The same values between memory full of NaN (or the largest integer)."""
    around = torch.full((values.numel() + 64,), torch.iinfo(values.dtype).max if values.dtype == torch.int16 else torch.nan, dtype=values.dtype)
    inside = around[32 : 32 + values.numel()]
    inside.copy_(values)
    return inside


def run(size: int, weight: torch.dtype, moments: torch.dtype, master: torch.dtype | None, impl: str, gradient: torch.dtype = torch.float32):
    torch.manual_seed(1)
    start = torch.randn(size)
    w, m, v = poisoned(start.to(weight)), poisoned(torch.zeros(size, dtype=moments)), poisoned(torch.zeros(size, dtype=moments))
    p = None if master is None else poisoned(torch.zeros(size, dtype=torch.int16) if master == torch.int16 else w.float())
    for step, g in enumerate(gradients(size), 1):
        adamw(w, g.to(gradient), m, v, settings(step), master=p, gradient_scale=torch.tensor(0.37), impl=impl)
    return [tensor for tensor in (w, m, v, p) if tensor is not None]


@pytest.mark.parametrize("size", SIZES)
def test_the_definition_is_torch_s_adamw(size):
    start = torch.randn(size, dtype=torch.float64)
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([theirs], betas=(0.9, 0.999), eps=1e-10, weight_decay=0.1)
    ours, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step, g in enumerate(gradients(size), 1):
        theirs.grad = 0.37 * g.double()
        optimizer.param_groups[0]["lr"] = settings(step).lr
        optimizer.step()
        adamw(ours, g.double(), m, v, settings(step), gradient_scale=torch.tensor(0.37, dtype=torch.float64))
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-14)


def test_a_split_master_is_the_fp32_value_bit_for_bit_and_its_upper_half_the_nearest_bf16():
    torch.manual_seed(0)
    values = torch.cat([torch.randn(5000) * 10.0 ** torch.randint(-30, 30, (5000,)), torch.tensor([0.0, -0.0, 1.0, -1.0, 3.4e38, torch.inf, 1e-45])])
    upper, lower = split(values)
    assert torch.equal(join(upper, lower).view(torch.int32), values.view(torch.int32))
    finite = values.abs() < 3.38e38
    assert ((upper.float() - values).abs() <= (values.bfloat16().float() - values).abs())[finite].all()
    assert (upper[finite] != values.bfloat16()[finite]).sum() <= 1  # ties alone


@pytest.mark.parametrize("size", SIZES)
def test_a_split_master_takes_the_steps_of_a_whole_one(size):
    impl = "fused" if INTERPRETED else "reference"
    w, m, v, lower = run(size, torch.bfloat16, torch.float32, torch.int16, impl)
    _, m_whole, v_whole, whole = run(size, torch.bfloat16, torch.float32, torch.float32, impl)
    assert torch.equal(join(w, lower), whole) and torch.equal(m, m_whole) and torch.equal(v, v_whole)


def test_bf16_moments_stay_near_those_in_fp32():
    exact, near = (run(3001, torch.bfloat16, moments, torch.float32, "reference")[3] for moments in (torch.float32, torch.bfloat16))
    torch.manual_seed(1)
    start = torch.randn(3001).bfloat16().float()
    assert 0 < (exact - near).norm() / (exact - start).norm() < 2e-2


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("weight", "master"), [(torch.float32, None), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.int16)])
def test_a_scale_that_is_no_number_leaves_every_bit_as_it_is(size, weight, master):
    torch.manual_seed(size)
    w, m, v = torch.randn(size).to(weight), torch.randn(size), torch.rand(size)
    p = None if master is None else torch.randint(-(1 << 15), 1 << 15, (size,)).to(torch.int16) if master == torch.int16 else torch.randn(size)
    held = [tensor for tensor in (w, m, v, p) if tensor is not None]
    before = [tensor.clone() for tensor in held]
    gradient = torch.full((size,), torch.nan)
    for scale, changes in ((torch.nan, False), (1.0, True)):
        adamw(w, gradient, m, v, settings(1), master=p, gradient_scale=torch.tensor(scale), impl="fused" if INTERPRETED else "reference")
        same = [torch.equal(now, then) for now, then in zip(held, before, strict=True)]
        assert all(same) if not changes else not any(same[:3])


def test_no_number_stays_no_number_in_both_halves():
    values = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001], dtype=torch.int32).view(torch.float32)
    upper, lower = split(values)
    assert values.isnan().all() and upper.isnan().all() and join(upper, lower).isnan().all()


def test_the_kernel_is_refused_by_name_where_it_cannot_run():
    weight = torch.zeros(4, dtype=torch.float64 if INTERPRETED else torch.float32)
    with pytest.raises(UserError, match="float64" if INTERPRETED else "not on CUDA"):
        adamw(weight, weight, weight.clone(), weight.clone(), settings(1), impl="fused")


if INTERPRETED:

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        ("weight", "master"), [(torch.float32, None), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.int16)], ids=["fp32", "whole", "split"]
    )
    def test_the_kernel_is_the_definition(size, weight, master, moments, gradient):
        fused, wanted = (run(size, weight, moments, master, impl, gradient) for impl in ("fused", "reference"))
        for ours, theirs in zip(fused, wanted, strict=True):
            if ours.dtype == torch.int16:
                ours, theirs = join(fused[0], ours), join(wanted[0], theirs)
            # in bf16 each of four steps differs by a unit in the last place (2^-8): the interpreter rounds towards zero
            tolerance = 4e-2 if torch.bfloat16 in (ours.dtype, moments) else 1e-6
            assert (ours.float() - theirs.float()).norm() <= tolerance * theirs.float().norm()

else:

    @pytest.mark.parametrize(("kind", "weight", "master"), [(0, "*fp32", "*fp32"), (1, "*bf16", "*fp32"), (2, "*bf16", "*i16")])
    def test_the_kernel_compiles_for_hopper(kind, weight, master):
        from megatron_prism.kernels.adamw.program import program

        types = [weight, "*fp32", "*bf16", "*bf16", master, "*fp32", "i32", *["fp32"] * 8]
        compiled_for_hopper(program, dict(zip(program.arg_names, types, strict=False)), {"KIND": kind, "SCALED": True, "BLOCK": 1024})

    def test_all_of_this_holds_for_the_triton_kernel_in_the_interpreter():
        passes_in_the_interpreter(__file__)
