"""The Triton kernel over rows of logits: log-sum-exp and the label's logit, or the loss's gradient in place of the logits, or both at once.

Owns: the kernel and its launches. One program has one row and goes over it in blocks; everything inside is fp32.
Legend: t tokens, v columns of the vocabulary at hand.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_prism.kernels.linear_cross_entropy.vocabulary import Vocabulary

LARGEST_BLOCK = 16384
"""columns at once: 16 fp32 registers for each of 1,024 threads, so that few rows are under way and the second pass finds its row in the L2 cache"""
COLUMNS_PER_THREAD = 16


@triton.jit
def _rows_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    labels_ptr,
    lse_ptr,
    label_logit_ptr,
    gradient_ptr,
    row_stride,
    columns,
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
    if STATISTICS:
        owned = counted & (column_of_label >= 0) & (column_of_label < real_columns)
        label_logit = tl.load(logits_ptr + column_of_label, mask=owned, other=-float("inf")).to(tl.float32) * scale
        largest = tl.full((), -float("inf"), tl.float32)
        total = tl.full((), 0.0, tl.float32)
        for start in range(0, real_columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            logit = tl.load(logits_ptr + column, mask=column < real_columns, other=-float("inf")).to(tl.float32) * scale
            new = tl.maximum(largest, tl.max(logit, 0))
            total = total * tl.exp(largest - new) + tl.sum(tl.exp(logit - new), 0)
            largest = new
        lse = largest + tl.log(total)
        tl.store(lse_ptr + row, lse)
        tl.store(label_logit_ptr + row, label_logit)
        tl.debug_barrier()  # all have read before any writes: a block narrower than the program's threads is read by several warps
    else:
        lse = tl.load(lse_ptr + row)
    if GRADIENT:
        factor = tl.load(gradient_ptr + row, mask=counted, other=0.0).to(tl.float32) * scale
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            real = column < real_columns
            logit = tl.load(logits_ptr + column, mask=real, other=-float("inf")).to(tl.float32) * scale
            is_label = tl.where(column == column_of_label, 1.0, 0.0)
            gradient = tl.where(real, (tl.exp(logit - lse) - is_label) * factor, 0.0)
            tl.store(logits_ptr + column, gradient.to(logits_ptr.dtype.element_ty), mask=column < columns)


def statistics(logits_tv: Tensor, labels_t: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Over the real columns: log-sum-exp and the label's logit (-inf where it is none of them) -> fp32 [2, t]."""
    found_2t = torch.empty(2, logits_tv.shape[0], dtype=torch.float32, device=logits_tv.device)
    _launch(logits_tv, labels_t, vocabulary, found_2t[0], found_2t[1], None)
    return found_2t


def to_gradient(logits_tv: Tensor, labels_t: Tensor, lse_t: Tensor, gradient_t: Tensor, vocabulary: Vocabulary) -> None:
    """Replace logits by gradient * (softmax - one-hot of the label) / logits_scaling; padding columns become 0, whatever they held."""
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
    tokens, columns = logits_tv.shape
    if not tokens:
        return
    assert logits_tv.stride(1) == 1 or columns <= 1
    block = min(LARGEST_BLOCK, triton.next_power_of_2(max(columns, 1)))
    _rows_kernel[(tokens,)](
        logits_tv,
        labels_t,
        lse_t,
        lse_t if label_logit_t is None else label_logit_t,
        lse_t if gradient_t is None else gradient_t,
        logits_tv.stride(0),
        columns,
        vocabulary.real_rows,
        vocabulary.first_row,
        vocabulary.ignore_index,
        1 / vocabulary.logits_scaling,
        STATISTICS=label_logit_t is not None,
        GRADIENT=gradient_t is not None,
        BLOCK=block,
        num_warps=min(32, max(4, block // (32 * COLUMNS_PER_THREAD))),
    )
