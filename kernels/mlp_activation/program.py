"""The Triton programs of `swiglu` and `squared_relu`; imported when they first run, because importing triton costs half a second.

A program has one block of columns of one row. With pointers, row strides and width that 16 divides, a thread's loads and stores are 16 bytes.
Row offsets are int64. Everything is computed in fp32. NaN stays NaN.
"""

import triton
import triton.language as tl


@triton.jit
def _place(width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """This program's row and columns."""
    blocks = tl.cdiv(width, BLOCK)
    row = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return row.to(tl.int64), column


@triton.jit
def swiglu_forward(x_ptr, y_ptr, x_stride, y_stride, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """y = silu(gate) * up."""
    row, column = _place(width, BLOCK)
    inside = column < width
    x_ptr += row * x_stride
    gate = tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + width + column, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * y_stride + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward(x_ptr, dy_ptr, dx_ptr, x_stride, dy_stride, dx_stride, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """dgate = dy * up * sigmoid * (1 + gate * (1 - sigmoid)), dup = dy * silu."""
    row, column = _place(width, BLOCK)
    inside = column < width
    x_ptr += row * x_stride
    dx_ptr += row * dx_stride
    gate = tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + width + column, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = dy * up * (sigmoid * (1 + gate * (1 - sigmoid)))
    tl.store(dx_ptr + column, dgate.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dx_ptr + width + column, (dy * gate * sigmoid).to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def squared_relu_forward(x_ptr, y_ptr, x_stride, y_stride, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """y = relu(x)^2."""
    row, column = _place(width, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    positive = tl.where(x < 0, 0.0, x)
    tl.store(y_ptr + row * y_stride + column, (positive * positive).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def squared_relu_backward(x_ptr, dy_ptr, dx_ptr, x_stride, dy_stride, dx_stride, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """dx = 2 relu(x) dy."""
    row, column = _place(width, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
    dx = 2 * tl.where(x < 0, 0.0, x) * dy
    tl.store(dx_ptr + row * dx_stride + column, dx.to(dx_ptr.dtype.element_ty), mask=inside)
