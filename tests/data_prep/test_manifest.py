"""One changed byte is found and named: at once in sizes and indices, at first read or in a full check in the tokens."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import xxhash

from megatron_prism.data_prep import manifest as manifests
from megatron_prism.data_prep.manifest import BlockHasher, Manifest, ReadCheck, Selection, load_manifest, verify, write_manifest
from megatron_prism.data_prep.writer import ShardWriter
from megatron_prism.errors import UserError

BLOCK = 64
RELEASED = Path(__file__).parents[1] / "fixtures" / "manifest_v1"


@pytest.fixture
def split(tmp_path, monkeypatch):
    """Two shards of 300 tokens in blocks of 64 bytes."""
    monkeypatch.setattr(BlockHasher.__init__, "__defaults__", (BLOCK,))
    shards = []
    for number in range(2):
        writer = ShardWriter(tmp_path / f"shard_{number:05d}", "uint16")
        writer.add(np.arange(300, dtype=np.uint16) + number, np.array([100, 50, 150], dtype=np.int32), 1000)
        shards.append(writer.finish())
    write_manifest(
        Manifest(tmp_path, "prose", "train", "hash", 400, 0, "uint16", 2000, tuple(shards), ({"path": "a", "bytes": 1},), block_bytes=BLOCK)
    )
    return tmp_path


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_manifest_reads_back_as_written_with_totals_and_lengths(split):
    found = verify(split, full=True)
    assert (found.num_documents, found.num_tokens, found.text_bytes) == (6, 600, 2000)
    assert found.document_lengths().tolist() == [100, 50, 150] * 2
    assert [prefix.name for prefix in found.prefixes] == ["shard_00000", "shard_00001"]
    assert len(found.shards[0].blocks) == 10
    assert found == load_manifest(split)


def test_a_flipped_byte_in_an_index_is_found_by_the_quick_check(split):
    flip(split / "shard_00001.idx", 40)
    with pytest.raises(UserError, match=r"shard_00001\.idx differs from its checksum"):
        verify(split)


def test_a_missing_or_shortened_file_is_found_by_the_quick_check(split):
    (split / "shard_00000.bin").write_bytes((split / "shard_00000.bin").read_bytes()[:-2])
    with pytest.raises(UserError, match=r"shard_00000\.bin has 598 bytes, its manifest says 600"):
        verify(split)
    (split / "shard_00000.bin").unlink()
    with pytest.raises(UserError, match=r"shard_00000\.bin is missing"):
        verify(split)


@pytest.mark.parametrize("place", [0, 63, 64, 320, 599])
def test_a_flipped_byte_of_a_token_is_found_in_its_block(split, place):
    flip(split / "shard_00001.bin", place)
    verify(split)
    with pytest.raises(UserError, match=rf"shard_00001\.bin, block {place // BLOCK} "):
        verify(split, full=True)


def test_the_first_read_checks_just_the_blocks_it_touches(split):
    flip(split / "shard_00000.bin", 200)  # block 3
    check = ReadCheck(load_manifest(split))
    check.check(0, 0, 192)
    check.check(0, 256, 600)
    check.check(1, 0, 600)
    with pytest.raises(UserError, match="block 3 "):
        check.check(0, 190, 193)


def test_a_block_is_read_once(split):
    check = ReadCheck(load_manifest(split))
    check.check(0, 0, 600)
    flip(split / "shard_00000.bin", 0)
    check.check(0, 0, 600)


def test_block_checksums_do_not_depend_on_how_the_bytes_came(monkeypatch):
    data = np.random.default_rng(0).bytes(1000)
    expected = tuple(xxhash.xxh3_64(data[start : start + 300]).hexdigest() for start in range(0, 1000, 300))
    for step in (1, 7, 300, 301, 1000):
        hasher = BlockHasher(300)
        for start in range(0, 1000, step):
            hasher.update(data[start : start + step])
        assert hasher.blocks() == expected
    exact = BlockHasher(500)
    exact.update(data)
    assert len(exact.blocks()) == 2


def test_folders_without_or_with_newer_or_broken_manifests_are_refused(split):
    with pytest.raises(UserError, match="has no manifest"):
        load_manifest(split / "nothing")
    text = (split / "manifest.json").read_text()
    (split / "manifest.json").write_text(text.replace('"schema_version": 1', '"schema_version": 9'))
    with pytest.raises(UserError, match="schema 9"):
        load_manifest(split)
    (split / "manifest.json").write_text(text[:100])
    with pytest.raises(UserError, match="cannot be read"):
        load_manifest(split)


def test_splits_of_different_tokenizers_do_not_join(split):
    from dataclasses import replace

    first = load_manifest(split)
    manifests.check_one_tokenizer([first, first])
    manifests.check_one_tokenizer([])
    with pytest.raises(UserError, match="different tokenizers"):
        manifests.check_one_tokenizer([first, replace(first, tokenizer_hash="other")])


def test_a_manifest_of_the_first_schema_reads_verifies_and_keeps_its_digest(tmp_path):
    found = verify(RELEASED, full=True)
    assert (found.schema_version, found.num_documents, found.num_tokens, found.selection, found.adopted) == (1, 6, 200, None, False)
    assert found.document_lengths().tolist() == [40, 10, 50] * 2
    assert found.digest() == "2c6381f3ce18ac6c8e2c6ab562ec4b602c60720f5e01f2a5f9a6e2c5752710a3"  # as that version computed it
    shutil.copytree(RELEASED, tmp_path / "again")
    write_manifest(load_manifest(tmp_path / "again"))
    assert json.loads((tmp_path / "again/manifest.json").read_text()) == json.loads((RELEASED / "manifest.json").read_text())


def test_a_selection_keeps_places_and_both_sides_make_the_whole(split):
    from dataclasses import replace

    from megatron_prism.data_prep.held_out import held_out

    whole = load_manifest(split)
    mask = held_out(3, "prose", 0, 6, 0.4)
    assert 0 < mask.sum() < 6
    sides = [replace(whole, adopted=True, selection=Selection(3, 0.4, side, int((mask == side).sum()), 0)) for side in (False, True)]
    train, held = (side.document_lengths() for side in sides)
    assert (train + held == whole.document_lengths()).all() and (np.minimum(train, held) == 0).all() and ((held > 0) == mask).all()
    tokens = np.concatenate([np.fromfile(f"{prefix}.bin", np.uint16) for prefix in whole.prefixes])
    starts = np.concatenate([[0], np.cumsum(whole.document_lengths())])
    for side, chosen in zip(sides, (~mask, mask), strict=True):
        expected = np.concatenate([tokens[starts[place] : starts[place + 1]] for place in np.flatnonzero(chosen)])
        assert np.concatenate([tokens[300 * shard + start :][:length] for shard, start, length in side.runs()]).tolist() == expected.tolist()
    write_manifest(sides[0])
    assert load_manifest(split) == sides[0] and json.loads((split / "manifest.json").read_text())["schema_version"] == 2
    assert len({side.digest() for side in (whole, *sides)}) == 3
