"""The tokenizer stage: text in, a sentencepiece model and the same tokenizer for Hugging Face out."""

import json
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from megatron_prism import artifact
from megatron_prism.config import validate
from megatron_prism.errors import UserError
from megatron_prism.stages import tokenizer

TEXTS = [f"Line {number} of a text about {number * 7} things:\n    return x + {number}\n\nAnswer: {number}" for number in range(300)]
HARD = ["", "  two spaces\n\n\n    four", "ünïcode ☃ 漢字", "3+4=7\n10-7=03", "tabs\there", TEXTS[3]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tokenizer")
    (place / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return tokenizer.run(_config(place, "out"))


def _config(place: Path, output: str, **changes: object) -> tokenizer.Config:
    source = {"name": "text", "paths": [str(place / "text.jsonl")]}
    return validate({"output": str(place / output), "vocab_size": 340, "source": [source], **changes}, tokenizer.Config, where="test")


def test_the_folder_is_a_finished_artifact_that_is_not_made_twice(folder: Path) -> None:
    artifact.require(folder, "tokenizer")
    before = (folder / "tokenizer.model").stat().st_mtime_ns
    tokenizer.run(_config(folder.parent, "out"))
    assert (folder / "tokenizer.model").stat().st_mtime_ns == before


def test_ids_are_those_of_sentencepiece_and_nothing_is_put_in_front(folder: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(folder)
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert len(loaded) == model.vocab_size() == 340
    assert loaded.eos_token_id == model.eos_id() == 1
    for text in HARD:
        assert loaded(text)["input_ids"] == model.encode(text)


def test_every_text_comes_back_as_it_was(folder: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(folder)
    for text in HARD:
        assert loaded.decode(loaded(text)["input_ids"]) == text


def test_digits_stand_alone(folder: Path) -> None:
    pieces = AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(AutoTokenizer.from_pretrained(folder)("1234 + 56")["input_ids"])
    assert [piece for piece in pieces if any(character.isdigit() for character in piece)] == list("123456")


def test_the_same_text_gives_the_same_tokenizer(folder: Path) -> None:
    again = tokenizer.run(_config(folder.parent, "again"))
    assert (again / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()


def test_a_vocabulary_that_the_text_cannot_fill_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="try a smaller vocab_size"):
        tokenizer.run(_config(folder.parent, "large", vocab_size=60_000))
    with pytest.raises(UserError, match="vocab_size"):
        _config(folder.parent, "small", vocab_size=258)


def test_max_bytes_bounds_the_text_of_each_source(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer.run(_config(folder.parent, "bounded", vocab_size=300, max_bytes=2_000))
    size = sum(len(text.encode()) for text in TEXTS)
    read = int(capsys.readouterr().out.split(" of ")[1].split()[0])
    assert 2_000 / size * len(TEXTS) <= read < 2_000 / size * len(TEXTS) + 5
