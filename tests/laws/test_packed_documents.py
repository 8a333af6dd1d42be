"""A packed buffer is its documents run one by one: the same loss and the same gradients, for every kind of layer; and planted faults break that."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from packed_rows import ENDS, OPTIONS, Result, boundaries, packed_row, result, rows_apart
from tiny_models import write_tiny

from megatron_prism.engine import parallel, verify
from megatron_prism.engine.model import Chunk
from megatron_prism.stages import convert

BOUND, FAULT = 1e-5, 1e-3
"""largest difference over largest value, fp32: sums in another order; what a fault must exceed"""
MODELS = ("llama", "mistral", "smollm3", "granite_hybrid_rope", "nemotron_h_one_group")


@pytest.fixture(scope="module", params=MODELS)
def chunk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chunk]:
    root: Path = tmp_path_factory.mktemp(request.param)
    write_tiny(request.param, root / "hf")
    convert.run(convert.Config(direction="import", source=root / "hf", output=root / "checkpoint"))
    yield verify.whole_model(root / "checkpoint", OPTIONS.seq_len)
    parallel.stop()


def apart(found: Result, expected: Result) -> float:
    assert found.keys() == expected.keys()
    return max(((found[name] - value).abs().max() / value.abs().max().clamp(min=1e-9)).item() for name, value in expected.items())


def test_a_buffer_gives_the_loss_and_gradients_of_its_documents_and_faults_do_not(chunk):
    """Positions that run on through the buffer change nothing either: rotary embeddings know differences alone."""
    expected, row, right = result(chunk, rows_apart(chunk.vocabulary)), [packed_row(chunk.vocabulary)], boundaries()
    assert apart(result(chunk, row, right), expected) < BOUND
    running_on = replace(right, max_seqlen_q=OPTIONS.seq_len, max_seqlen_kv=OPTIONS.seq_len)
    assert apart(result(chunk, row, running_on), expected) < BOUND
    for fault in (None, *map(boundaries, ENDS)):
        assert apart(result(chunk, row, fault), expected) > FAULT, fault


def test_selective_recomputation_knows_the_boundaries_too(chunk):
    """Attention run again in the backward pass."""
    expected = result(chunk, rows_apart(chunk.vocabulary))
    attention = [module for module in chunk.modules() if hasattr(module, "checkpoint_core_attention")]
    assert attention
    for module in attention:
        module.checkpoint_core_attention = True
    try:
        assert apart(result(chunk.train(), [packed_row(chunk.vocabulary)], boundaries()), expected) < BOUND
    finally:
        chunk.eval()
        for module in attention:
            module.checkpoint_core_attention = False
