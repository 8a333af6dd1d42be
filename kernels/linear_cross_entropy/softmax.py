"""The Triton kernel over rows of logits: log-sum-exp and the label's logit, or the loss's gradient in place of the logits, or both at once.

Owns: the kernel and its launches. One program has one row and goes over it in blocks; everything inside is fp32.
Legend: t tokens, v columns of the vocabulary at hand.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_prism.kernels.linear_cross_entropy.head import ROW_UNIT
from megatron_prism.kernels.linear_cross_entropy.vocabulary import Vocabulary

LARGEST_BLOCK = 16384
"""columns at once: few rows are then under way, and the second pass finds its row in the L2 cache"""
COLUMNS_PER_THREAD = 16
LOWEST = tl.constexpr(-3e38)
"""below every logit, and finite: the difference of two is a number"""
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    labels_ptr,
    lse_ptr,
    label_logit_ptr,
    gradient_ptr,
    row_stride,
    real_columns,
    first_column,
    ignore_index,
    scale,
    STATISTICS: tl.constexpr,  # noqa: N803
    GRADIENT: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64)  # row * row_stride exceeds int32
    logits_ptr += row * row_stride
    label = tl.load(labels_ptr + row).to(tl.int64)
    counted = label != ignore_index
    column_of_label = label - first_column
    base_2 = scale * LOG2_E
    if STATISTICS:
        owned = counted & (column_of_label >= 0) & (column_of_label < real_columns)
        label_logit = tl.load(logits_ptr + column_of_label, mask=owned, other=-float("inf")).to(tl.float32) * scale
        # eight neighbours are in one thread: a maximum and a sum for each eight, which meet only after the loop
        largest = tl.full((BLOCK // 8,), LOWEST, tl.float32)
        total = tl.zeros((BLOCK // 8,), tl.float32)
        for start in range(0, real_columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            logit = tl.load(logits_ptr + column, mask=column < row_stride, other=0.0).to(tl.float32) * base_2
            eights = tl.reshape(tl.where(column < real_columns, logit, -float("inf")), (BLOCK // 8, 8))
            new = tl.maximum(largest, tl.max(eights, 1))
            total = total * tl.exp2(largest - new) + tl.sum(tl.exp2(eights - new[:, None]), 1)
            largest = new
        highest = tl.max(largest, 0)
        lse = (highest + tl.log2(tl.sum(total * tl.exp2(largest - highest), 0))) / LOG2_E
        tl.store(lse_ptr + row, lse)
        tl.store(label_logit_ptr + row, label_logit)
        tl.debug_barrier()  # all have read before any writes: a block narrower than the program's threads is read by several warps
    else:
        lse = tl.load(lse_ptr + row)
    if GRADIENT:
        factor = tl.load(gradient_ptr + row, mask=counted, other=0.0).to(tl.float32) * scale
        for start in range(0, row_stride, BLOCK):
            column = start + tl.arange(0, BLOCK)
            logit = tl.load(logits_ptr + column, mask=column < row_stride, other=0.0).to(tl.float32) * base_2
            is_label = tl.where(column == column_of_label, 1.0, 0.0)
            gradient = tl.where(column < real_columns, (tl.exp2(logit - lse * LOG2_E) - is_label) * factor, 0.0)
            tl.store(logits_ptr + column, gradient.to(logits_ptr.dtype.element_ty), mask=column < row_stride)


def statistics(logits_tv: Tensor, labels_t: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Over the real columns: log-sum-exp and the label's logit (-inf where it is none of them) -> fp32 [2, t]."""
    found_2t = torch.empty(2, logits_tv.shape[0], dtype=torch.float32, device=logits_tv.device)
    _launch(logits_tv, labels_t, vocabulary, found_2t[0], found_2t[1], None)
    return found_2t


def to_gradient(logits_tv: Tensor, labels_t: Tensor, lse_t: Tensor, gradient_t: Tensor, vocabulary: Vocabulary) -> None:
    """Replace logits by gradient * (softmax - one-hot of the label) / logits_scaling; what follows the real columns becomes 0."""
    _launch(logits_tv, labels_t, vocabulary, lse_t, None, gradient_t)


def statistics_and_gradient(logits_tv: Tensor, labels_t: Tensor, gradient_t: Tensor, vocabulary: Vocabulary) -> Tensor:
    """`statistics` and, with its log-sum-exp, `to_gradient`: for a vocabulary that is all here."""
    found_2t = torch.empty(2, logits_tv.shape[0], dtype=torch.float32, device=logits_tv.device)
    _launch(logits_tv, labels_t, vocabulary, found_2t[0], found_2t[1], gradient_t)
    return found_2t


def _launch(
    logits_tv: Tensor, labels_t: Tensor, vocabulary: Vocabulary, lse_t: Tensor, label_logit_t: Tensor | None, gradient_t: Tensor | None
) -> None:
    """label_logit_t: statistics are wanted; gradient_t: the gradient is."""
    tokens, row_stride = logits_tv.shape[0], logits_tv.stride(0)
    if not tokens:
        return
    assert row_stride % ROW_UNIT == 0 and logits_tv.stride(1) == 1
    block = min(LARGEST_BLOCK, triton.next_power_of_2(max(row_stride, ROW_UNIT)))
    _rows_kernel[(tokens,)](
        logits_tv,
        labels_t,
        lse_t,
        lse_t if label_logit_t is None else label_logit_t,
        lse_t if gradient_t is None else gradient_t,
        row_stride,
        vocabulary.real_rows,
        vocabulary.first_row,
        vocabulary.ignore_index,
        1 / vocabulary.logits_scaling,
        STATISTICS=label_logit_t is not None,
        GRADIENT=gradient_t is not None,
        BLOCK=block,
        num_warps=min(32, max(4, block // (32 * COLUMNS_PER_THREAD))),
    )
