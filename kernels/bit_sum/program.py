"""The Triton program of `bit_sum`; imported when it first runs, because importing triton costs half a second."""

import triton
import triton.language as tl


@triton.jit
def program(numbers_ptr, sums_ptr, count, programs, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Every so-manieth block of a tensor. WIDE: a sum of four bytes would not hold this program's numbers."""
    first = tl.program_id(0).to(tl.int64)  # so that places beyond 2^31 can be told
    total = tl.zeros((BLOCK,), dtype=tl.int64 if WIDE else tl.int32)
    for block in range(first, tl.cdiv(count, BLOCK), programs):
        place = block * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(numbers_ptr + place, mask=place < count, other=0).to(total.dtype)
    tl.store(sums_ptr + first, tl.sum(total.to(tl.int64)))
