"""A long prompt read a chunk at a time is the prompt read at once, whatever the cache is made of; and what is never held is never asked for."""

from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from tiny_models import write_tiny

from megatron_prism.engine.verify import without_cuda_kernels
from megatron_prism.generate import chunks
from megatron_prism.generate.interface import Completion, Request, Sampling, Scored
from megatron_prism.generate.transformers_backend import TransformersGenerator

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},  # a window of 5 tokens: shorter than a chunk
    "granite_hybrid": {},
    "nemotron_h": {"time_step_min": 1e-9, "time_step_max": 0.1},  # test_continuous.py says why
}
CHUNK = 7
LENGTHS = (3, 7, 8, 15, 50, 64, 64)


@pytest.fixture(scope="module", params=FAMILIES)
def generator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TransformersGenerator]:
    folder = write_tiny(request.param, tmp_path_factory.mktemp("model") / "hf", **FAMILIES[request.param])
    with without_cuda_kernels():
        loaded = TransformersGenerator.load(folder)
        yield TransformersGenerator(loaded.model, loaded.tokenizer, batch_size=4, eos_ids=[])


def prompts(generator: TransformersGenerator) -> list[tuple[int, ...]]:
    random = np.random.default_rng(0)
    return [tuple(random.integers(3, generator.model.config.vocab_size, length).tolist()) for length in LENGTHS]


def complete(generator: TransformersGenerator) -> list[Completion]:
    done: dict[int, Completion] = {}
    asked = [Request(prompt, place) for place, prompt in enumerate(prompts(generator))]
    generator.generate_requests(asked, Sampling(max_new_tokens=9), lambda request, completion: done.update({request.place: completion}))
    return [done[place] for place in range(len(asked))]


def test_completions_are_those_of_prompts_read_at_once(generator: TransformersGenerator) -> None:
    whole = complete(generator)
    read: list[tuple[int, int]] = []
    forward = generator.model.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        read.append(tuple(kwargs["input_ids"].shape))
        found = forward(*args, **kwargs)
        assert found.logits.shape[1] == 1, "the logits of one token"
        return found

    with mock.patch.object(chunks, "CHUNK_TOKENS", CHUNK), mock.patch.object(generator.model, "forward", watched):
        generator.model.forward.__signature__ = signature(forward)
        in_chunks = complete(generator)
    assert max(width for _, width in read) == CHUNK and (2, CHUNK) in read, "short prompts together, long ones alone"
    for one, two in zip(whole, in_chunks, strict=True):
        assert one.tokens == two.tokens
        np.testing.assert_allclose(two.logprobs, one.logprobs, atol=1e-5, rtol=0)


def test_scores_are_those_of_texts_read_at_once(generator: TransformersGenerator) -> None:
    pairs = [(prompt[:cut], prompt[cut:]) for prompt in prompts(generator) for cut in (1, len(prompt) // 2, len(prompt))]
    whole = generator.score(pairs)
    with mock.patch.object(chunks, "CHUNK_TOKENS", CHUNK):
        in_chunks: list[Scored] = generator.score(pairs)
    for one, two in zip(whole, in_chunks, strict=True):
        assert one.greedy == two.greedy
        np.testing.assert_allclose(two.logprobs, one.logprobs, atol=1e-5, rtol=0)


def test_chunks_cover_a_text_and_none_is_one_token_alone() -> None:
    for length in range(2, 100):
        parts = chunks.chunks(length, CHUNK)
        assert [place for part in parts for place in range(length)[part]] == list(range(length))
        assert all(2 <= part.stop - part.start <= CHUNK for part in parts) and len(parts) == -(-length // CHUNK)
    assert chunks.chunks(1, CHUNK) == [slice(0, 1)]


def test_no_mask_is_as_wide_as_the_prompt_twice(tmp_path: Path) -> None:
    """The rule that makes 128k fit: what the model is handed grows with chunk x prompt, not with prompt x prompt."""
    generator = TransformersGenerator.load(write_tiny("llama", tmp_path / "hf"))
    seen: list[int] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(query.shape[-2] * key.shape[-2])
        return attend(query, key, *args, **kwargs)

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", watched), mock.patch.object(chunks, "CHUNK_TOKENS", 16):
        generator.generate([list(range(3, 93)) * 2], Sampling(max_new_tokens=1))
    assert 0 < max(seen) <= 16 * 180
