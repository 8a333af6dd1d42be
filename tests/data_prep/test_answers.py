"""Which characters of a document are answers, and which tokens then: worked out by hand, and the file that keeps them against plain lists."""

from pathlib import Path

import numpy as np
import pytest

from megatron_prism.data_prep import masks, worker
from megatron_prism.data_prep.answers import after_cuts, tokens_of
from megatron_prism.data_prep.documents import Extract, read_chunk
from megatron_prism.data_prep.formats import Messages, fill
from megatron_prism.data_prep.manifest import Manifest, load_manifest, verify, write_manifest
from megatron_prism.data_prep.masks import MaskReader, MaskWriter
from megatron_prism.data_prep.shards import bin_path, mask_path
from megatron_prism.data_prep.tokenizer import Tokenizer, load_marking_encoder
from megatron_prism.data_prep.writer import ShardWriter
from megatron_prism.errors import UserError


def parts(text: str, answers: object) -> list[str]:
    return [text[begin:end] for begin, end in answers]  # type: ignore[attr-defined]


def turns(*pairs: tuple[str, str]) -> dict[str, object]:
    return {"messages": [{"role": role, "content": text} for role, text in pairs]}


ROW = turns(("system", "Be kind."), ("user", "Q?"), ("assistant", "A."), ("user", "And?"), ("assistant", "B!"))


def test_answers_are_what_the_assistant_says_with_the_line_break_that_ends_it():
    chat = Messages("messages", "role", "content", "chat").marked(ROW)
    assert chat.text == "System: Be kind.\nUser: Q?\nAssistant: A.\nUser: And?\nAssistant: B!"
    assert parts(chat.text, chat.answers) == ["A.\n", "B!"]
    plain = Messages("messages", "role", "content", "question_answer").marked(ROW)
    assert plain.text == "Be kind.\nQ?\nA.\nAnd?\nB!" and parts(plain.text, plain.answers) == ["A.\n", "B!"]


def test_a_formats_answers_are_the_columns_that_the_recipe_names():
    row = {"q": "1+1", "a": "2", "why": "add"}
    marked = fill("Q: {q}\nA: {a}\nbecause {why}.", row, ("a", "why"))
    assert (marked.text, parts(marked.text, marked.answers)) == ("Q: 1+1\nA: 2\nbecause add.", ["2\n", "add"])
    assert fill("{q} {a}", row, ()) == ("1+1 2", None)


def test_a_token_that_holds_a_character_of_an_answer_is_of_the_answer():
    offsets = np.array([[0, 3], [3, 3], [3, 5], [5, 8], [8, 8], [8, 12]])
    assert tokens_of([(4, 8)], offsets).tolist() == [False, False, True, True, False, False]
    assert tokens_of([(0, 1), (11, 12)], offsets).tolist() == [True, False, False, False, False, True]
    assert not tokens_of([(3, 3)], offsets).any() and not tokens_of([], offsets).any()


def test_white_space_of_an_answer_counts_whatever_the_tokenizer_leaves_out_of_places(tokenizer_folder):
    from tokenizers import Tokenizer as Backend
    from tokenizers import processors

    backend = Backend.from_file(str(tokenizer_folder / "tokenizer.json"))
    untrimmed = load_marking_encoder(backend.to_str())(["def\n        return   "])
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    assert backend.encode("  a", add_special_tokens=False).offsets[0] != (0, 1), "this one trims"
    ids, places = load_marking_encoder(backend.to_str())(["def\n        return   "])
    assert ids[0].tolist() == untrimmed[0][0].tolist() and places[0].tolist() == untrimmed[1][0].tolist()
    assert tokens_of([(3, 21)], places[0])[-1], "the last token is white space"


def test_the_end_of_document_is_learnt_only_after_an_answer_with_text(tokenizer_folder, monkeypatch):
    described = Tokenizer("", (tokenizer_folder / "tokenizer.json").read_text(), "", 502, 0)
    monkeypatch.setattr(worker, "_tokenizer", described, raising=False)
    rows = [{"q": "ask", "a": "say"}, {"q": "ask", "a": ""}]
    form = Extract("text", "{q}\n{a}", 0, answers=("a",))
    found = worker.tokenise("records", rows, form)
    first, second = np.split(found.answers, [found.lengths[0]])
    assert first[-1] and not second.any()


def test_characters_that_cleaning_takes_out_move_the_answers_behind_them():
    text = "ask me now|the answer is|end"
    for cuts in ([(0, 4)], [(4, 7), (11, 15)], [(8, 14)], [(22, 26)], [(10, 24)]):
        kept = [place for place in range(len(text)) if not any(begin <= place < end for begin, end in cuts)]
        after = "".join(text[place] for place in kept)
        expected = "".join(text[place] for place in kept if 11 <= place < 24)
        assert parts(after, after_cuts([(11, 24)], cuts)) == [expected]


def test_documents_carry_their_answers_to_the_tokenizer():
    extract = Extract("text", "{q}\n{a}", 1, answers=("a",))
    found = read_chunk("records", [{"q": "x", "a": "yes"}, {"q": "", "a": ""}, {"q": "long", "a": "no"}], extract)
    assert [parts(text, answers) for text, answers in zip(found.texts, found.answers, strict=True)] == [["yes"], ["no"]]
    assert read_chunk("records", [{"text": "t"}], Extract("text", None, 1)).answers == [None]


def split(folder: Path, sizes: list[int], seed: int = 0, shards: int = 1) -> tuple[Manifest, list[np.ndarray]]:
    """A split whose tokens are of random answers; each shard written in pieces of `sizes` tokens. The bits of each shard too."""
    draw = np.random.default_rng(seed)
    found, bits = [], []
    for number in range(shards):
        writer = ShardWriter(folder / f"shard_{number:05d}", "uint16")
        rows = [draw.random(size) < 0.4 for size in sizes]
        for row in rows:
            writer.add(np.arange(len(row), dtype=np.uint16), np.array([len(row)], np.int32), 1, row)
        found.append(writer.finish())
        bits.append(np.concatenate(rows))
    manifest = Manifest(folder, "s", "train", "0" * 64, 500, 0, "uint16", 1, tuple(found))
    write_manifest(manifest)
    return manifest, bits


@pytest.mark.parametrize("sizes", [[1], [8], [3, 5, 1, 30, 7], [1] * 20, [1000, 1]])
def test_any_range_of_a_mask_is_read_as_it_was_written(tmp_path, sizes):
    _, bits = split(tmp_path / "train", sizes, shards=2)
    manifest = verify(tmp_path / "train", full=True)
    assert manifest.num_answers == sum(int(part.sum()) for part in bits)
    assert mask_path(manifest.prefixes[0]).stat().st_size == -(-sum(sizes) // 8)
    reader = MaskReader(manifest)
    for shard, expected in enumerate(bits):
        for first in range(0, len(expected), max(1, len(expected) // 17)):
            for count in {1, 7, 8, 9, len(expected) - first}:
                if first + count <= len(expected):
                    assert reader.read(shard, first, count).tolist() == expected[first : first + count].tolist()


def test_shards_joined_to_one_have_the_masks_of_all(tmp_path, monkeypatch):
    monkeypatch.setattr(masks, "READ_BYTES", 2)
    first, second = (split(tmp_path / name, [5, 6, 30, 2], seed) for seed, name in enumerate("ab"))
    writer = ShardWriter(tmp_path / "c" / "joined", "uint16")
    for manifest, _ in (first, second):
        writer.copy(manifest.prefixes[0], "", 1, manifest.shards[0])
    shard = writer.finish()
    expected = np.concatenate([first[1][0], second[1][0]])
    assert shard.mask is not None and shard.mask.answers == expected.sum()
    whole = np.concatenate(list(masks.read_whole(tmp_path / "c" / "joined.mask", shard.tokens)))
    assert whole.tolist() == expected.tolist()


@pytest.mark.parametrize("kind", ["bin", "idx", "mask"])
def test_a_shard_that_changed_before_it_is_joined_is_refused_by_name(tmp_path, kind):
    manifest, _ = split(tmp_path / "a", [5, 6, 30, 2])
    path = Path(f"{manifest.prefixes[0]}.{kind}")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    writer = ShardWriter(tmp_path / "c" / "joined", "uint16")
    with pytest.raises(UserError, match=rf"shard_00000\.{kind} changed since it was written"):
        writer.copy(manifest.prefixes[0], "", 1, manifest.shards[0])


def test_what_is_given_up_on_a_full_disk_leaves_nothing_there(tmp_path):
    """A second failure, that of closing, keeps no file."""
    writer = ShardWriter(tmp_path / "shard_00000", "uint16")
    writer.add(np.zeros(2, np.uint16), np.array([2], np.int32), 1, np.ones(2, bool))
    assert len(list(tmp_path.glob(".*.tmp"))) == 2 and writer._mask is not None
    for file in (writer, writer._mask):
        file._file.close()
        file._file = Path("/dev/full").open("wb")  # noqa: SIM115
        file._file.write(b"some")
    writer.discard()
    assert not list(tmp_path.glob(".*"))


def test_a_changed_mask_is_found_and_unmasked_shards_are_as_before(tmp_path):
    manifest, _ = split(tmp_path / "train", [40])
    assert manifest.schema_version == 3 and load_manifest(tmp_path / "train") == manifest
    path = mask_path(manifest.prefixes[0])
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    verify(tmp_path / "train")
    for find in (lambda: verify(tmp_path / "train", full=True), lambda: MaskReader(manifest).read(0, 3, 2)):
        with pytest.raises(UserError, match=r"shard_00000\.mask, block 0"):
            find()
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"shard_00000\.mask has 4 bytes, its manifest says 5"):
        verify(tmp_path / "train")
    plain = ShardWriter(tmp_path / "plain" / "shard_00000", "uint16")
    plain.add(np.arange(4, dtype=np.uint16), np.array([4], np.int32), 1)
    unmasked = Manifest(tmp_path / "plain", "s", "train", "0" * 64, 500, 0, "uint16", 1, (plain.finish(),))
    text = write_manifest(unmasked).read_text()
    assert unmasked.schema_version == 1 and "mask" not in text and unmasked.num_answers is None
    assert not mask_path(unmasked.prefixes[0]).exists() and bin_path(unmasked.prefixes[0]).exists()


def test_answers_are_in_the_digest_of_those_who_learn_them_alone(tmp_path):
    one, other = (split(tmp_path / name, [40], seed)[0] for seed, name in enumerate("ab"))
    assert one.digest() == other.digest() != one.digest(answers=True) != other.digest(answers=True)


def test_a_shard_of_documents_with_and_without_known_answers_cannot_be(tmp_path):
    writer = ShardWriter(tmp_path / "s", "uint16")
    writer.add(np.zeros(2, np.uint16), np.array([2], np.int32), 1)
    with pytest.raises(AssertionError, match="with and without"):
        writer.add(np.zeros(2, np.uint16), np.array([2], np.int32), 1, np.ones(2, bool))
    unused = MaskWriter(tmp_path / "t.mask.tmp")
    assert unused.temporary.match(".t.mask.*.tmp")
    unused.discard()
    assert not list(tmp_path.glob(".t*"))
