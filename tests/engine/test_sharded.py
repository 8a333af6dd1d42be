"""The streaming torch_dist reader and writer: any cut is read back, only what overlaps is read, damage is refused by name."""

import json

import pytest
import torch

from megatron_prism.engine.sharded import EmptyObject, Piece, Reader, is_sharded, write_streaming
from megatron_prism.errors import UserError

LAYERS = 3


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "rows": torch.randn(LAYERS, 10, 6, generator=generator),
        "columns": torch.randn(LAYERS, 10, 6, generator=generator).bfloat16(),
        "halves": torch.randn(LAYERS, 14, 6, generator=generator),
        "norm": torch.randn(LAYERS, 6, generator=generator),
        "table": torch.randn(11, 6, generator=generator),
    }


def pieces(whole):
    yield Piece("table", [whole["table"]], tp_axis=0)
    for layer in range(LAYERS):
        place, stage = (layer, LAYERS), layer % 2
        yield EmptyObject("rows._extra_state", place, stage)
        yield Piece("rows", [whole["rows"][layer]], place, 0, stage)
        yield Piece("columns", [whole["columns"][layer]], place, 1, stage)
        yield Piece("halves", list(whole["halves"][layer].split([8, 6])), place, 0, stage)
        yield Piece("norm", [whole["norm"][layer]], place, None, stage)


@pytest.mark.parametrize("tp", [1, 2, 4, 5])
def test_every_slice_of_every_cut_reads_back(tmp_path, tp):
    whole = tensors()
    write_streaming(tmp_path, pieces(whole), tp)
    reader = Reader(tmp_path)
    assert reader.keys() == sorted(whole)
    assert reader.objects() == [f"rows._extra_state/shard_{layer}_{LAYERS}" for layer in range(LAYERS)]
    for key, tensor in whole.items():
        assert (reader.shape(key), reader.dtype(key)) == (tuple(tensor.shape), tensor.dtype)
        for index in [(), (1,), (slice(0, 2),), (2, slice(3, 5)), (slice(1, 3), slice(2, 6), slice(1, 4)), (0, slice(4, 4))][
            : 3 if tensor.dim() == 2 else 6
        ]:
            assert torch.equal(reader.read(key, *index), tensor[index])
    assert len(list(tmp_path.glob("*.distcp"))) == 2 * tp


def test_chunks_are_those_that_megatron_core_makes_of_a_gated_mlp(tmp_path):
    write_streaming(tmp_path, pieces(tensors()), tp=2)
    chunks = [chunk for chunk in Reader(tmp_path).chunks("halves") if chunk[0][0] == 1]
    assert chunks == [((1, 0, 0), (1, 4, 6)), ((1, 4, 0), (1, 4, 6)), ((1, 8, 0), (1, 3, 6)), ((1, 11, 0), (1, 3, 6))]


def test_only_overlapping_chunks_are_read(tmp_path, monkeypatch):
    write_streaming(tmp_path, pieces(tensors()), tp=5)
    reader = Reader(tmp_path)
    read = []
    original = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: read.append(original(*args, **kwargs)) or read[-1])
    reader.read("rows", 1, slice(3, 6))
    assert [tuple(chunk.shape) for chunk in read] == [(1, 2, 6), (1, 2, 6)]


def test_a_view_into_a_large_storage_is_stored_alone(tmp_path):
    large = torch.zeros(1_000_000)
    write_streaming(tmp_path, [Piece("small", [large[10:20]])])
    assert (tmp_path / "__0_0.distcp").stat().st_size < 5_000


def test_layers_of_different_types_are_refused(tmp_path):
    mixed = [Piece("norm", [torch.zeros(4, dtype=dtype)], (layer, 2)) for layer, dtype in enumerate((torch.float32, torch.bfloat16))]
    with pytest.raises(UserError, match="norm must have one type"):
        write_streaming(tmp_path, mixed)
    assert not is_sharded(tmp_path)


def test_half_written_truncated_and_foreign_folders_are_refused_by_name(tmp_path):
    write_streaming(tmp_path, pieces(tensors()), tp=2)
    file = tmp_path / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"__1_0\.distcp has .* cut short"):
        Reader(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=r"__1_0\.distcp is missing"):
        Reader(tmp_path)
    (tmp_path / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    with pytest.raises(UserError, match="zarr"):
        Reader(tmp_path)
    (tmp_path / ".metadata").unlink()
    with pytest.raises(UserError, match="no torch_dist checkpoint"):
        Reader(tmp_path)


def test_a_damaged_metadata_file_is_refused_by_name(tmp_path):
    write_streaming(tmp_path, pieces(tensors()))
    (tmp_path / ".metadata").write_bytes((tmp_path / ".metadata").read_bytes()[:50])
    with pytest.raises(UserError, match=r"\.metadata has 50 bytes; \d+ were written"):
        Reader(tmp_path)
    (tmp_path / "checksums.json").unlink()  # as an earlier version, or Megatron-LM, wrote it
    with pytest.raises(UserError, match=r"\.metadata cannot be read"):
        Reader(tmp_path)


def test_an_unknown_name_is_refused(tmp_path):
    write_streaming(tmp_path, pieces(tensors()))
    with pytest.raises(UserError, match="no tensor 'nothing'"):
        Reader(tmp_path).read("nothing")


def test_a_writer_that_fails_leaves_no_checkpoint(tmp_path):
    def failing():
        yield Piece("a", [torch.zeros(3)])
        raise RuntimeError("disk full")

    write_streaming(tmp_path, pieces(tensors()))
    with pytest.raises(RuntimeError):
        write_streaming(tmp_path, failing())
    assert not is_sharded(tmp_path)
