"""Decoding with kept keys, values and Mamba states gives the logits of the whole sequence at once, and the tokens that transformers writes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import write_tiny

from megatron_prism.engine import decode, parallel, verify
from megatron_prism.errors import UserError
from megatron_prism.stages import convert

LENGTH, PROMPT = 24, 9


@pytest.fixture
def imported(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    write_tiny(request.param, tmp_path / "hf")
    convert.run(convert.Config(direction="import", source=tmp_path / "hf", output=tmp_path / "checkpoint"))
    yield tmp_path / "hf", tmp_path / "checkpoint"
    parallel.stop()


NAMES = ("granite", "mistral", "smollm3", "granite_hybrid", "granite_hybrid_rope", "nemotron_h")


@pytest.mark.parametrize("imported", NAMES, indirect=True)
def test_cached_steps_equal_the_whole_sequence_and_the_text_is_that_of_transformers(imported):
    hf, checkpoint = imported
    chunk = verify.whole_model(checkpoint, LENGTH)
    ids = verify.token_ids(chunk.vocabulary, LENGTH)
    with torch.no_grad():
        whole = chunk(ids, torch.arange(LENGTH).expand_as(ids), None)[..., : chunk.vocabulary]
    decoder = decode.Decoder(chunk, batch_size=2, max_length=LENGTH)
    pieces = [ids[:, :PROMPT], ids[:, PROMPT : PROMPT + 3], *ids[:, PROMPT + 3 :].split(1, dim=1)]
    cached = torch.cat([decoder.feed(piece) for piece in pieces], dim=1)
    assert (cached - whole).abs().max() < 1e-5 * whole.abs().max()
    written = decode.greedy(chunk, ids[:, :PROMPT], LENGTH - PROMPT)
    theirs = verify.transformers_model(hf)
    theirs.generation_config.eos_token_id = None  # to the full length
    # without its cache: one step of transformers' own decoding leaves out the bounds of Mamba's time steps
    expected = theirs.generate(ids[:, :PROMPT], do_sample=False, use_cache=False, max_new_tokens=LENGTH - PROMPT, pad_token_id=0)
    assert torch.equal(written, expected[:, PROMPT:])


@pytest.mark.parametrize("imported", ["granite"], indirect=True)
def test_more_tokens_than_there_is_room_for_are_refused(imported):
    chunk = verify.whole_model(imported[1], LENGTH)
    decoder = decode.Decoder(chunk, batch_size=2, max_length=4)
    with pytest.raises(UserError, match="max_length=4"):
        decoder.feed(verify.token_ids(chunk.vocabulary, 5))


@pytest.mark.parametrize("imported", ["granite"], indirect=True)
def test_a_model_that_cuts_the_sequence_is_refused(imported):
    chunk = verify.whole_model(imported[1], LENGTH)
    chunk.config.sequence_parallel = True
    with pytest.raises(UserError, match="sp=false"):
        decode.Decoder(chunk, batch_size=2, max_length=LENGTH)
