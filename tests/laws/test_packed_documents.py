"""A packed buffer is its documents run one by one: the same loss and the same gradients, for every kind of layer; and planted faults break that."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import write_tiny

from megatron_prism.data_prep import packing
from megatron_prism.data_prep.packing import PackingOptions
from megatron_prism.engine import parallel, verify
from megatron_prism.engine.documents import Documents, documents
from megatron_prism.engine.model import Chunk
from megatron_prism.stages import convert

BOUND, FAULT = 1e-5, 1e-3
"""largest difference over largest value, fp32: sums in another order; what a fault must exceed"""
OPTIONS = PackingOptions(48, 4)
LENGTHS = np.array([17, 6, 1, 13])
"""padded: 20, 8, 4 and 16, that is one full buffer; mistral's window of 5 is shorter than most"""
MODELS = ("llama", "mistral", "smollm3", "granite_hybrid_rope", "nemotron_h_one_group")
Result = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=MODELS)
def chunk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chunk]:
    root: Path = tmp_path_factory.mktemp(request.param)
    write_tiny(request.param, root / "hf")
    convert.run(convert.Config(direction="import", source=root / "hf", output=root / "checkpoint"))
    yield verify.whole_model(root / "checkpoint", OPTIONS.seq_len)
    parallel.stop()


def texts(vocabulary: int) -> list[np.ndarray]:
    draw = np.random.default_rng(5)
    return [draw.integers(1, vocabulary, length) for length in LENGTHS]


def result(chunk: Chunk, rows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Documents | None]]) -> Result:
    """Loss, summed over the rows' counted tokens, and every gradient. A row: tokens, positions, labels, mask [s], boundaries."""
    chunk.zero_grad(set_to_none=True)
    total = torch.zeros(())
    for *row, boundaries in rows:
        tokens, positions, labels, mask = (column.unsqueeze(0) for column in row)
        losses = chunk(tokens, positions, None, labels=labels, loss_mask=mask, packed_seq_params=boundaries)
        total = total + (losses * mask).sum()
    total.backward()
    gradients = {name: weight.grad.clone() for name, weight in chunk.named_parameters() if weight.grad is not None}
    return {"loss": total.detach(), **gradients}


def packed_row(chunk: Chunk) -> list[torch.Tensor]:
    spans = packing.pack(LENGTHS, OPTIONS).spans(0)
    found = texts(chunk.vocabulary)
    tokens, labels = packing.tokens_and_labels(spans, OPTIONS, lambda document, start, length: found[document][start : start + length], 0)
    return [torch.from_numpy(row) for row in (tokens, packing.position_ids(spans, OPTIONS), labels, packing.loss_mask(spans, OPTIONS))]


def boundaries() -> Documents:
    ends = packing.cu_seqlens(packing.pack(LENGTHS, OPTIONS).spans(0), OPTIONS)
    return documents(torch.from_numpy(ends), tuple(np.diff(ends).tolist()))


def one_by_one(chunk: Chunk) -> Result:
    rows = []
    for text in map(torch.from_numpy, texts(chunk.vocabulary)):
        if len(text) > 1:
            rows.append((text[:-1], torch.arange(len(text) - 1), text[1:], torch.ones(len(text) - 1), None))
    return result(chunk, rows)


def apart(found: Result, expected: Result) -> float:
    assert found.keys() == expected.keys()
    return max(((found[name] - value).abs().max() / value.abs().max().clamp(min=1e-9)).item() for name, value in expected.items())


def test_a_buffer_gives_the_loss_and_gradients_of_its_documents_and_faults_do_not(chunk):
    """Positions that run on through the buffer change nothing either: rotary embeddings know differences alone."""
    expected, row, right = one_by_one(chunk), packed_row(chunk), boundaries()
    assert apart(result(chunk, [(*row, right)]), expected) < BOUND
    running_on = replace(right, max_seqlen_q=OPTIONS.seq_len, max_seqlen_kv=OPTIONS.seq_len)
    assert apart(result(chunk, [(*row, running_on)]), expected) < BOUND

    shifted_by_one = documents(torch.tensor([0, 19, 36, 44, 48], dtype=torch.int32), (19, 17, 8, 4))
    one_missing = documents(torch.tensor([0, 36, 44, 48], dtype=torch.int32), (36, 8, 4))
    for fault in (None, shifted_by_one, one_missing):
        assert apart(result(chunk, [(*row, fault)]), expected) > FAULT, fault


def test_selective_recomputation_knows_the_boundaries_too(chunk):
    """Attention run again in the backward pass."""
    expected = one_by_one(chunk)
    attention = [module for module in chunk.modules() if hasattr(module, "checkpoint_core_attention")]
    assert attention
    for module in attention:
        module.checkpoint_core_attention = True
    try:
        assert apart(result(chunk.train(), [(*packed_row(chunk), boundaries())]), expected) < BOUND
    finally:
        chunk.eval()
        for module in attention:
            module.checkpoint_core_attention = False
