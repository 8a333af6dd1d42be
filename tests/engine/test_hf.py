"""Hugging Face folders: what is written loads with the safetensors library, and every kind of damage is named."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import edit_config, write_llama

from megatron_prism.engine import hf
from megatron_prism.errors import UserError


@pytest.fixture
def sharded(tmp_path):
    """A folder with several shards and an index."""
    folder = write_llama(tmp_path / "hf", max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_all_shards_are_read(sharded):
    reader = hf.Reader(sharded)
    wanted = {name: tensor for file in sharded.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert reader.entries.keys() == wanted.keys()
    assert all(torch.equal(reader.tensor(name), tensor) for name, tensor in wanted.items())
    assert reader.nbytes == sum(tensor.nbytes for tensor in wanted.values())


@pytest.mark.skipif(sys.platform != "linux", reason="madvise's advice is given on Linux")
def test_the_system_takes_the_advice_to_read_ahead(sharded):
    reader = hf.Reader(sharded)
    assert all(hf._read_ahead(reader.tensor(name)) for name in reader.entries)
    assert not hf._read_ahead(torch.zeros(0))


@pytest.mark.parametrize("limit", [10**9, 300, 1])
def test_written_shards_load_with_the_safetensors_library(tmp_path, limit):
    tensors = {
        "a": torch.randn(5, 7).t(),
        "b.bias": torch.randn(9).bfloat16(),
        "c": torch.arange(6).reshape(2, 3),
        "scalar": torch.tensor(2.5, dtype=torch.float16),
        "empty": torch.zeros(0, 4),
    }
    plan = [hf.Planned(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    files = hf.write_weights(tmp_path, plan, tensors.items(), max_shard_bytes=limit)
    found = {name: tensor for file in files for name, tensor in load_file(tmp_path / file).items()}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert hf.Reader(tmp_path).entries.keys() == tensors.keys()
    if len(files) > 1:
        assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
        assert json.loads((tmp_path / hf.INDEX).read_text())["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        sizes = [sum(item.nbytes for item in group) for group in hf.shards(plan, limit).values()]
        assert all(size <= limit or len(group) == 1 for size, group in zip(sizes, hf.shards(plan, limit).values(), strict=True))


def test_old_shards_do_not_survive_a_new_write(tmp_path):
    plan = [hf.Planned("a", (4,), torch.float32), hf.Planned("b", (4,), torch.float32)]
    values = [("a", torch.zeros(4)), ("b", torch.ones(4))]
    hf.write_weights(tmp_path, plan, values, max_shard_bytes=1)
    assert hf.write_weights(tmp_path, plan, values) == ["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]


def test_ghost_keys_of_the_index_are_refused(sharded):
    index = json.loads((sharded / hf.INDEX).read_text())
    index["weight_map"]["model.ghost.weight"] = next(iter(index["weight_map"].values()))
    (sharded / hf.INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"lists model\.ghost\.weight"):
        hf.Reader(sharded)


def test_unlisted_tensors_are_refused(sharded):
    index = json.loads((sharded / hf.INDEX).read_text())
    del index["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    (sharded / hf.INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"holds model\.layers\.1\.mlp\.up_proj\.weight, which .* does not list"):
        hf.Reader(sharded)


def test_missing_and_truncated_shards_are_refused(sharded):
    file = sorted(sharded.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match=f"{file.name} is truncated"):
        hf.Reader(sharded)
    file.write_bytes(b"")
    with pytest.raises(UserError, match=f"{file.name} is truncated"):
        hf.Reader(sharded)
    file.unlink()
    with pytest.raises(UserError, match=f"{file.name} is missing"):
        hf.Reader(sharded)


def test_a_damaged_index_is_refused(sharded):
    (sharded / hf.INDEX).write_text("{}")
    with pytest.raises(UserError, match="weight_map"):
        hf.Reader(sharded)


def test_pickled_weights_are_refused_with_advice(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="save_pretrained"):
        hf.Reader(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors"):
        hf.Reader(tmp_path)


def test_our_own_unfinished_folder_is_refused(tmp_path):
    folder = write_llama(tmp_path / "hf")
    (folder / "provenance.json").write_text("{}")
    with pytest.raises(UserError, match="COMPLETE"):
        hf.Reader(folder)


def test_everything_but_weights_is_carried_byte_for_byte(sharded, tmp_path):
    (sharded / "additional_chat_templates").mkdir()
    (sharded / "additional_chat_templates" / "tool.jinja").write_bytes(b"\xc3\xa9\r\n")
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "COMPLETE", "provenance.json", ".hidden"):
        (sharded / name).write_text("x")
    carried = hf.carry_files(sharded, tmp_path / "copy")
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "README.md"} <= set(carried)
    assert "additional_chat_templates/tool.jinja" in carried
    assert not {"pytorch_model.bin", hf.INDEX, "pytorch_model.bin.index.json", "COMPLETE", "provenance.json", ".hidden"} & set(carried)
    for name in carried:
        assert (tmp_path / "copy" / name).read_bytes() == (sharded / name).read_bytes()


def test_the_declared_type_changes_only_when_it_must(tmp_path):
    folder = write_llama(tmp_path / "hf")
    before = (folder / "config.json").read_bytes()
    hf.declare_dtype(folder / "config.json", torch.float32)
    assert (folder / "config.json").read_bytes() == before
    hf.declare_dtype(folder / "config.json", torch.bfloat16)
    after = json.loads((folder / "config.json").read_text())
    assert {key for key, value in json.loads(before).items() if after[key] != value} == {"dtype"} and after["dtype"] == "bfloat16"
    edit_config(folder, dtype=None, torch_dtype="float32")
    hf.declare_dtype(folder / "config.json", torch.float16)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "float16"
