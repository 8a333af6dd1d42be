"""Law 6 for the sum of bits: the definition against Python's own integers, and the Triton kernel against the definition."""

import pytest
import torch
from triton_checks import INTERPRETED, compiled_for_hopper, passes_in_the_interpreter

from megatron_prism.errors import UserError
from megatron_prism.kernels.bit_sum import bit_sum, fused
from megatron_prism.kernels.bit_sum.reference import INTEGERS

TYPES = [torch.bfloat16, torch.float32, torch.int16, torch.uint8, torch.float64]


def random_bits(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(-128, 128, (count * dtype.itemsize,), dtype=torch.int8, generator=torch.Generator().manual_seed(count)).view(dtype)


def python_sum(tensors: list[torch.Tensor]) -> int:
    """In integers without an end, then modulo 2^64, signed."""
    total = sum(sum(tensor.flatten().view(INTEGERS[tensor.element_size()]).tolist()) for tensor in tensors)
    return (total + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("impl", ["fused"] if INTERPRETED else ["reference"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_it_is_the_sum_that_python_makes(impl, dtype):
    for count in (1, 2, 4095, 4096, 10_001):
        tensors = [random_bits(count, dtype), random_bits(count + 3, torch.float32).view(1, -1), torch.zeros(0)]
        assert bit_sum(tensors, impl=impl).item() == python_sum(tensors)


@pytest.mark.parametrize("impl", ["fused"] if INTERPRETED else ["reference"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_extremes_do_not_overflow_the_sums_of_programs_that_take_many_strides(impl, dtype, monkeypatch):
    monkeypatch.setattr(fused, "PROGRAMS", 3)
    for byte in (0x80, 0x7F, 0xFF):
        tensors = [torch.full((dtype.itemsize * 70_001,), byte, dtype=torch.uint8).view(dtype)]
        assert bit_sum(tensors, impl=impl).item() == python_sum(tensors)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_single_flipped_bit_changes_it_and_parts_add_up(dtype):
    whole = random_bits(37, dtype)
    expected = bit_sum([whole])
    assert torch.equal(bit_sum([whole[:5]]) + bit_sum([whole[5:]]), expected)
    bits = whole.view(torch.uint8)
    for place in range(bits.numel()):
        for bit in range(8):
            bits[place] ^= 1 << bit
            assert bit_sum([whole]) != expected, (place, bit)
            bits[place] ^= 1 << bit
    assert bit_sum([whole]) == expected


if not INTERPRETED:

    def test_the_kernel_passes_in_triton_s_interpreter():
        passes_in_the_interpreter(__file__)

    @pytest.mark.parametrize("kind", ["i8", "i16", "i32", "i64"])
    def test_the_kernel_compiles_for_hopper(kind):
        from megatron_prism.kernels.bit_sum.program import program

        types = {"numbers_ptr": f"*{kind}", "sums_ptr": "*i64", "count": "i64", "programs": "i32"}
        compiled_for_hopper(program, types, {"WIDE": kind in ("i32", "i64"), "BLOCK": fused.BLOCK}, aligned=True)

    def test_a_kernel_that_cannot_run_is_refused_by_name():
        with pytest.raises(UserError, match=r"bit_sum with impl='fused' cannot run here: the tensors are not on CUDA"):
            bit_sum([torch.zeros(8)], impl="fused")
