"""Perplexity equals a direct computation; every token of a split is predicted once; domains add up their sources."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_hf import make_tiny_model
from tiny_shards import DOCUMENTS, write_split
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_prism.data_prep.blend import Blend, BlendSource
from megatron_prism.data_prep.manifest import load_manifest
from megatron_prism.errors import UserError
from megatron_prism.evals.perplexity import Likelihood, by_domain, held_out, measure, window_starts
from megatron_prism.evals.tokens import TokenStream


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), seed=1)


def _blend(path: Path, folder: Path, shards: int = 1) -> Blend:
    return Blend(
        0, (BlendSource("story", "general", 1.0, path / "none", write_split(path / "story" / "validation", folder, DOCUMENTS, shards=shards)),)
    )


def test_the_stream_is_the_documents_over_all_shards(tmp_path: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stream = TokenStream(load_manifest(write_split(tmp_path / "a" / "validation", folder, DOCUMENTS, shards=3)))
    expected = [token for text in DOCUMENTS for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert stream.read(0, len(stream)).tolist() == expected
    assert [stream.read(start, 5).tolist() for start in range(len(stream) - 5)] == [expected[start : start + 5] for start in range(len(expected) - 5)]


def test_a_changed_byte_is_refused(tmp_path: Path, folder: Path) -> None:
    split = write_split(tmp_path / "a" / "validation", folder, DOCUMENTS)
    path = load_manifest(split).prefixes[0].with_suffix(".bin")
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="checksum"):
        TokenStream(load_manifest(split)).read(0, 10)


@pytest.mark.parametrize("shards", [1, 2])
def test_perplexity_equals_a_direct_computation(tmp_path: Path, folder: Path, shards: int) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    (part,) = held_out(_blend(tmp_path, folder, shards), seq_len=16, max_tokens=None)
    found = measure(model, tokenizer, part, batch_size=3)
    ids = [token for text in DOCUMENTS for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    nll = 0.0
    for place in range(1, len(ids)):
        start = (place - 1) // 16 * 16  # the window that predicts this token
        with torch.inference_mode():
            logits = model(torch.tensor([ids[start:place]])).logits[0, -1]
        nll -= logits.log_softmax(-1)[ids[place]].item()
    assert found.tokens == len(ids) - 1
    assert found.nll == pytest.approx(nll, rel=1e-5)
    first = len(tokenizer.decode(ids[:1]).encode())
    assert found.bytes == sum(len(text.encode()) for text in DOCUMENTS) - first
    figures = found.figures()
    assert figures["perplexity"] == pytest.approx(math.exp(nll / (len(ids) - 1)), rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(nll / math.log(2) / found.bytes, rel=1e-5)


def test_every_token_is_predicted_once_and_a_limit_spreads_over_the_split() -> None:
    for tokens in (2, 16, 17, 18, 100):
        windows = [range(start + 1, min(start + 17, tokens)) for start in window_starts(tokens, 16, None)]
        assert [place for window in windows for place in window] == list(range(1, tokens))
    starts = window_starts(16 * 100 + 1, 16, 16 * 5)
    assert len(starts) == 5
    assert (starts[0], starts[-1]) == (0, 16 * 99)
    assert window_starts(0, 16, None) == window_starts(1, 16, None) == []


def test_the_batch_does_not_change_the_loss(tmp_path: Path, folder: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    (part,) = held_out(_blend(tmp_path, folder), seq_len=8, max_tokens=None)
    one, many = (measure(model, tokenizer, part, batch_size=size) for size in (1, 7))
    assert one.nll == pytest.approx(many.nll, rel=1e-6)
    assert (one.tokens, one.bytes) == (many.tokens, many.bytes)


def test_domains_add_tokens_not_losses() -> None:
    total = by_domain([("code", Likelihood(10.0, 5, 20)), ("math", Likelihood(1.0, 1, 1)), ("code", Likelihood(2.0, 7, 4))])
    assert list(total) == ["code", "math"]
    assert total["code"] == Likelihood(12.0, 12, 24)
    assert total["code"].loss == 1.0


def test_a_model_with_fewer_tokens_is_refused(tmp_path: Path, folder: Path) -> None:
    small = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path / "small", vocab_size=260))
    (part,) = held_out(_blend(tmp_path, folder), seq_len=8, max_tokens=None)
    with pytest.raises(UserError, match="300 token ids, the model has 260"):
        measure(small, AutoTokenizer.from_pretrained(folder), part, 4)


def test_a_blend_without_validation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no validation tokens"):
        held_out(Blend(0, (BlendSource("a", "general", 1.0, tmp_path),)), 8, None)


def test_windows_stay_within_the_limit(tmp_path: Path, folder: Path) -> None:
    (part,) = held_out(_blend(tmp_path, folder), seq_len=8, max_tokens=24)
    assert [len(window) for window in part.windows] == [9, 9, 9] or sum(len(window) - 1 for window in part.windows) <= 24
    assert all(window.dtype == np.int64 for window in part.windows)
