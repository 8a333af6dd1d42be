"""Our shards are megatron-core's indexed datasets: what it writes we read, what we write it reads."""

import warnings

import numpy as np
import pytest

from megatron_prism.data_prep import shards
from megatron_prism.data_prep.writer import ShardWriter
from megatron_prism.errors import UserError


def write(prefix, documents, dtype):
    writer = ShardWriter(prefix, dtype)
    for start in range(0, len(documents), 7):
        part = documents[start : start + 7]
        writer.add(np.concatenate(part).astype(dtype), np.array([len(row) for row in part], dtype=np.int32), 10)
    return writer.finish()


@pytest.mark.parametrize("vocab_size", [1000, 65499, 65500, 200_000])
def test_megatron_core_reads_every_document_with_its_boundaries(tmp_path, vocab_size):
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

    generator = np.random.default_rng(0)
    documents = [generator.integers(0, vocab_size, generator.integers(1, 50)) for _ in range(40)]
    dtype = shards.token_dtype(vocab_size)
    assert np.dtype(dtype) == DType.optimal_dtype(vocab_size)
    shard = write(tmp_path / "shard_00000", documents, dtype)
    read = IndexedDataset(str(tmp_path / "shard_00000"))
    assert len(read) == shard.documents == 40
    assert read.document_indices.tolist() == list(range(41))
    assert read.sequence_lengths.tolist() == [len(row) for row in documents]
    assert all((read[number] == row).all() and read[number].dtype == dtype for number, row in enumerate(documents))


def test_our_index_is_megatron_cores_byte_for_byte(tmp_path):
    warnings.simplefilter("ignore")
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    documents = [np.arange(length) for length in (3, 1, 20)]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for row in documents:
        builder.add_document(torch.tensor(row), [len(row)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    write(tmp_path / "ours", documents, "uint16")
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    index = shards.read_index(tmp_path / "theirs.idx")
    assert index.dtype == "uint16" and index.lengths.tolist() == [3, 1, 20]


def test_a_shard_appears_only_when_it_is_finished(tmp_path):
    writer = ShardWriter(tmp_path / "shard_00000", "uint16")
    writer.add(np.arange(5, dtype=np.uint16), np.array([2, 3], dtype=np.int32), 9)
    assert not list(tmp_path.glob("shard*"))
    writer.discard()
    assert not list(tmp_path.iterdir())


def test_cut_foreign_and_packed_indices_are_refused(tmp_path):
    good = shards.index_bytes(np.array([3, 4]), "uint16")
    packed = bytearray(good[:-8])  # two sequences, and a table with the one document 0 to 2
    packed[26:34], packed[-8:] = (2).to_bytes(8, "little"), (2).to_bytes(8, "little")
    version, floats = bytearray(good), bytearray(good)
    version[9], floats[17] = 2, 7
    cases = [(good[:-1], "cut short"), (good[:20], "cut short"), (b"x" * 100, "no index"), (bytes(packed), "packs documents")]
    for data, words in (*cases, (bytes(version), "version 2 "), (bytes(floats), "dtype code is 7")):
        (tmp_path / "a.idx").write_bytes(data)
        with pytest.raises(UserError, match=words):
            shards.read_index(tmp_path / "a.idx")
