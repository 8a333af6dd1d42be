"""An export's config.json: byte for byte the published one; of one that transformers 5 wrote, the same model for transformers 5 and for 4.57."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import TINY, write_tiny

from megatron_prism import artifact, families
from megatron_prism.config import Block
from megatron_prism.engine import weights


class Nothing(Block):
    """The config of a folder made by a test."""


def round_trip(source, folder):
    artifact.begin(folder / "checkpoint", "checkpoint", Nothing())
    weights.import_hf(source, folder / "checkpoint", tp=2, pp=2)
    artifact.complete(folder / "checkpoint")
    return weights.export_hf(folder / "checkpoint", folder / "back")


@pytest.mark.parametrize("name", ["granite", "granite_hybrid", "nemotron_h"])
def test_a_published_config_comes_back_byte_for_byte(name, tmp_path):
    source = write_tiny(name, tmp_path / "hf")
    assert (round_trip(source, tmp_path) / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize("name", ["granite", "granite_hybrid", "nemotron_h"])
def test_a_config_of_transformers_5_comes_back_readable_by_transformers_4_too(name, tmp_path):
    from transformers import AutoConfig

    source = write_tiny(name, tmp_path / "hf")
    AutoConfig.from_pretrained(source).save_pretrained(source)
    written = families.read_config(source)
    back = round_trip(source, tmp_path)
    exported = families.read_config(back)
    assert AutoConfig.from_pretrained(back).to_json_string() == AutoConfig.from_pretrained(source).to_json_string()
    if name == "nemotron_h":  # which transformers 4.57 does not have
        assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()
    else:
        assert "rope_theta" not in written and exported["rope_theta"] == 1e7
        assert exported.get("layer_types") == TINY[name].get("layer_types")
    ours, theirs = load_file(back / "model.safetensors"), load_file(source / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


def test_the_type_asked_for_is_named_under_every_key(tmp_path):
    source = write_tiny("granite_hybrid", tmp_path / "hf")
    config = {key: value for key, value in TINY["granite_hybrid"].items() if key not in ("rope_theta", "torch_dtype")}
    (source / "config.json").write_text(json.dumps({**config, "dtype": "float32", "rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}))
    round_trip(source, tmp_path)
    exported = families.read_config(weights.export_hf(tmp_path / "checkpoint", tmp_path / "half", "bfloat16"))
    assert (exported["dtype"], exported["torch_dtype"], exported["rope_theta"]) == ("bfloat16", "bfloat16", 2e4)
