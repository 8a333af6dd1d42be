"""Law 6 for the cast of masters to FP8: the definition against every number that e4m3 has, and the Triton kernel against the definition.

TransformerEngine's quantizer needs a GPU: tests/gpu/test_gpu_fp8_params.py compares with it.
"""

import pytest
import torch
from triton_checks import INTERPRETED, compiled_for_hopper, passes_in_the_interpreter

from megatron_prism.errors import UserError
from megatron_prism.kernels.fp8_cast import fp8_cast, largest, scales_of

NUMBERS = torch.arange(256, dtype=torch.uint8)
FINITE = NUMBERS[~NUMBERS.view(torch.float8_e4m3fn).float().isnan()]
VALUES = FINITE.view(torch.float8_e4m3fn).double()


def masters(count: int) -> torch.Tensor:
    torch.manual_seed(count)
    return torch.randn(count) * 10.0 ** torch.randint(-6, 2, (count,))


def nearest(scaled: torch.Tensor) -> torch.Tensor:
    """Of e4m3's numbers the nearest, of two as near the one whose last bit is 0; its sign is the value's."""
    distance = (scaled.double()[:, None] - VALUES).abs()
    as_near = distance == distance.min(dim=1, keepdim=True).values
    other_sign = torch.signbit(scaled)[:, None] != torch.signbit(VALUES)
    return FINITE[(4 * ~as_near + 2 * other_sign + (FINITE & 1)).argmin(dim=1)]


def cast(master: torch.Tensor, scale: torch.Tensor, impl: str = "reference") -> torch.Tensor:
    """Between memory that must stay as it is."""
    around = torch.full((master.numel() + 64,), 99, dtype=torch.uint8)
    fp8_cast(master, scale, around[32:-32], impl=impl)
    assert (around[:32] == 99).all() and (around[-32:] == 99).all()
    return around[32:-32].clone()


def test_a_master_becomes_the_nearest_fp8_of_its_bf16_times_the_scale():
    ties = (VALUES.sort().values[1:] + VALUES.sort().values[:-1]) / 2  # five bits: bf16 has them
    for master in (masters(3001), ties.float(), torch.tensor([0.0, -0.0])):
        for scale in (torch.ones(()), *scales_of(largest([master]))[0]):
            scaled = master.bfloat16().float() * scale
            assert torch.equal(cast(master, scale), nearest(scaled))


def test_the_largest_value_of_any_weight_becomes_the_largest_of_e4m3():
    found = [masters(count) * 10.0**power for count, power in ((1, 0), (7, -20), (3001, 20), (40, -35))]
    amaxes = largest(found)
    assert torch.equal(amaxes, torch.stack([master.bfloat16().float().abs().max() for master in found]))
    scales, inverses = scales_of(amaxes)
    assert torch.equal(scales * inverses > 0, torch.ones(4, dtype=torch.bool)) and torch.equal(inverses, 1 / scales)
    assert [int(cast(master, scale).view(torch.float8_e4m3fn).float().abs().max()) for master, scale in zip(found, scales, strict=True)] == [448] * 4


def test_a_scale_is_the_nearest_fp32_to_the_quotient_for_every_largest_value_that_bf16_has():
    """As TransformerEngine's, which asks for this rounding by name."""
    amaxes = torch.arange(1, 0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    expected = (448.0 / amaxes.double()).clamp(max=torch.finfo(torch.float32).max).float()
    scales, inverses = scales_of(amaxes)
    assert torch.equal(scales, expected) and torch.equal(inverses, (1 / expected.double()).float())


def test_a_weight_without_values_has_the_scale_one_and_a_tiny_one_a_finite_scale():
    scales, inverses = scales_of(torch.tensor([0.0, torch.inf, torch.nan, 1e-38, 448.0]))
    assert scales.tolist() == [1.0, 1.0, 1.0, torch.finfo(torch.float32).max, 1.0] and inverses.isfinite().all()


@pytest.mark.parametrize("cut", [0, 1, 2048, 3000])
def test_parts_of_a_weight_become_what_the_whole_becomes(cut):
    whole = masters(3001)
    parts = [whole[:cut], whole[cut:]]
    scale = scales_of(largest([part for part in parts if part.numel()]).amax().view(1))[0][0]
    assert torch.equal(scale, scales_of(largest([whole]))[0][0])
    assert torch.equal(torch.cat([cast(part, scale) for part in parts]), cast(whole, scale))


if INTERPRETED:

    @pytest.mark.parametrize("count", [1, 7, 2048, 5001])
    def test_the_kernel_is_the_definition(count):
        """Of numbers that e4m3 has: the interpreter cuts off where a GPU rounds."""
        torch.manual_seed(count)
        master = FINITE[torch.randint(len(FINITE), (count,))].view(torch.float8_e4m3fn).float() / 8
        scale = torch.tensor(8.0)
        assert torch.equal(cast(master, scale, "fused"), cast(master, scale))

else:

    def test_the_kernel_passes_in_triton_s_interpreter():
        passes_in_the_interpreter(__file__)

    def test_the_kernel_compiles_for_hopper_and_rounds_in_its_instruction():
        from megatron_prism.kernels.fp8_cast.program import program

        types = {"master_ptr": "*fp32", "scale_ptr": "*fp32", "out_ptr": "*u8", "count": "i32"}
        compiled = compiled_for_hopper(program, types, {"BLOCK": 2048}, aligned=True)
        assert "cvt.rn.satfinite.e4m3x2.f32" in compiled.asm["ptx"]

    def test_a_kernel_that_cannot_run_is_refused_by_name():
        with pytest.raises(UserError, match=r"fp8_cast with impl='fused' cannot run here: the tensors are not on CUDA"):
            cast(masters(8), torch.ones(()), "fused")
