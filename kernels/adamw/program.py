"""The Triton program of `adamw`; imported when it first runs, because importing triton costs half a second."""

import triton
import triton.language as tl


@triton.jit
def program(  # type: ignore[no-untyped-def]
    weight_ptr,
    gradient_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    master_ptr,
    scale_ptr,
    count,
    decay,
    step_size,
    root_scale,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    KIND: tl.constexpr,  # noqa: N803
    SCALED: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """One block of weights. KIND: 0 no master, 1 an fp32 master, 2 the lower half of one."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    kept = inside
    g = tl.load(gradient_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        scale = tl.load(scale_ptr)
        kept = inside & (tl.full((BLOCK,), 0.0, tl.float32) + scale == scale)  # a NaN stands for: leave everything as it is
        g *= scale
    m = tl.load(exp_avg_ptr + place, mask=inside, other=0.0).to(tl.float32) * beta1 + g * rest1
    v = tl.load(exp_avg_sq_ptr + place, mask=inside, other=0.0).to(tl.float32) * beta2 + g * g * rest2
    if KIND == 0:
        w = tl.load(weight_ptr + place, mask=inside, other=0.0)
    elif KIND == 1:
        w = tl.load(master_ptr + place, mask=inside, other=0.0)
    else:
        upper = tl.load(weight_ptr + place, mask=inside, other=0.0).to(tl.int16, bitcast=True).to(tl.int32)
        lower = tl.load(master_ptr + place, mask=inside, other=0).to(tl.int32)
        w = ((upper << 16) + lower).to(tl.float32, bitcast=True)
    w = w * (1 - decay)
    w = w - step_size * m / (tl.sqrt(v) * root_scale + eps)
    tl.store(exp_avg_ptr + place, m.to(exp_avg_ptr.dtype.element_ty), mask=kept)
    tl.store(exp_avg_sq_ptr + place, v.to(exp_avg_sq_ptr.dtype.element_ty), mask=kept)
    if KIND == 2:
        bits = w.to(tl.int32, bitcast=True)
        upper = tl.where(w == w, (bits + 0x8000) >> 16, 0x7FC0)  # a quiet NaN: the largest would round up to minus zero
        lower = tl.where(w == w, bits - (upper << 16), 0)
        tl.store(weight_ptr + place, upper.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=kept)
        tl.store(master_ptr + place, lower.to(tl.int16), mask=kept)
    else:
        tl.store(weight_ptr + place, w.to(weight_ptr.dtype.element_ty), mask=kept)
        if KIND == 1:
            tl.store(master_ptr + place, w, mask=kept)
