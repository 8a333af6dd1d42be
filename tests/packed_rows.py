"""One packed buffer and the documents in it, for tests that a model makes the same of both; and boundaries that are wrong."""

import numpy as np
import torch

from megatron_prism.data_prep import packing
from megatron_prism.data_prep.packing import PackingOptions
from megatron_prism.engine.documents import Documents, documents

OPTIONS = PackingOptions(48, 4)
LENGTHS = np.array([17, 6, 1, 13])
"""padded: 20, 8, 4 and 16, that is one full buffer; mistral's window of 5 is shorter than most"""
ENDS = {"shifted by one": [0, 19, 36, 44, 48], "one forgotten": [0, 36, 44, 48]}
"""faults: other ends than the right ones"""
Row = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""tokens, positions, labels and mask, [1, s] each"""
Result = dict[str, torch.Tensor]


def texts(vocabulary: int) -> list[np.ndarray]:
    draw = np.random.default_rng(5)
    return [draw.integers(1, vocabulary, length) for length in LENGTHS]


def packed_row(vocabulary: int) -> Row:
    spans = packing.pack(LENGTHS, OPTIONS).spans(0)
    found = texts(vocabulary)
    tokens, labels = packing.tokens_and_labels(spans, OPTIONS, lambda document, start, length: found[document][start : start + length], 0)
    tokens, positions, labels, mask = (
        torch.from_numpy(row).unsqueeze(0) for row in (tokens, packing.position_ids(spans, OPTIONS), labels, packing.loss_mask(spans, OPTIONS))
    )
    return tokens, positions, labels, mask


def rows_apart(vocabulary: int) -> list[Row]:
    """Each document by itself, without padding; the one of a single token has nothing to learn."""
    long_enough = [torch.from_numpy(text).unsqueeze(0) for text in texts(vocabulary) if len(text) > 1]
    return [(row[:, :-1], torch.arange(row.shape[1] - 1).unsqueeze(0), row[:, 1:], torch.ones(1, row.shape[1] - 1)) for row in long_enough]


def boundaries(fault: str | None = None, device: str = "cpu") -> Documents:
    right = packing.cu_seqlens(packing.pack(LENGTHS, OPTIONS).spans(0), OPTIONS)
    ends = right if fault is None else np.array(ENDS[fault], np.int32)
    return documents(torch.from_numpy(ends).to(device), tuple(np.diff(ends).tolist()))


def result(model: torch.nn.Module, rows: list[Row], packed: Documents | None = None) -> Result:
    """Loss, summed over the rows' counted tokens, and every gradient, fp32 on the CPU."""
    model.zero_grad(set_to_none=True)
    device = next(model.parameters()).device
    total = torch.zeros((), device=device)
    for row in rows:
        tokens, positions, labels, mask = (column.to(device) for column in row)
        losses = model(tokens, positions, None, labels=labels, loss_mask=mask, packed_seq_params=packed)
        total = total + (losses.float() * mask).sum()
    total.backward()
    gradients = {name.removeprefix("module."): weight.grad.float().cpu() for name, weight in model.named_parameters() if weight.grad is not None}
    return {"loss": total.detach().cpu(), **gradients}
