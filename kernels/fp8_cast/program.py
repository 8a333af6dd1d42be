"""The Triton program of `fp8_cast`; imported when it first runs, because importing triton costs half a second."""

import triton
import triton.language as tl


@triton.jit
def program(master_ptr, scale_ptr, out_ptr, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """One block of weights."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    w = tl.load(master_ptr + place, mask=inside, other=0.0).to(tl.bfloat16).to(tl.float32) * tl.load(scale_ptr)
    tl.store(out_ptr + place, w.to(tl.float8e4nv).to(tl.uint8, bitcast=True), mask=inside)
