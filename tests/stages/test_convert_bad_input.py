"""Bad Hugging Face folders, dense and hybrid: each is named in one message, and nothing is left that could be taken for a checkpoint."""

import json
import re

import pytest
import torch
from prism_command import prism
from safetensors.torch import load_file, save_file
from tiny_models import TINY, edit_config, write_tiny

from megatron_prism import artifact
from megatron_prism.config import validate
from megatron_prism.errors import UserError
from megatron_prism.stages import convert


def refused(source, tmp_path, message):
    """Import `source`; assert that it is refused with `message` on one line, and that what was written is refused too."""
    out = tmp_path / "out"
    config = validate({"direction": "import", "source": str(source), "output": str(out)}, convert.Config, "test")
    with pytest.raises(UserError, match=message) as caught:
        convert.run(config)
    assert "\n" not in str(caught.value)
    assert not artifact.is_complete(out) and not (out / "sharded").exists()


def change(source, edit):
    """Rewrite the one weight file of a folder; `edit` changes the dictionary in place."""
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


CONTRADICTIONS = [
    ("granite_hybrid", {"layer_types": ["attention", "mamba", "mamba", "mamba"]}, r"lacks model\.layers\.0\.self_attn"),
    ("granite_hybrid", {"mamba_n_groups": 2}, r"layers\.0\.mamba\.in_proj\.weight has shape \[296, 64\], but config\.json says \[328, 64\]"),
    ("granite_hybrid", {"mamba_conv_bias": False}, r"holds model\.layers\.0\.mamba\.conv1d\.bias, .* its config\.json may not fit its weights"),
    ("granite_hybrid", {"shared_intermediate_size": 64}, r"shared_mlp\.input_linear\.weight has shape \[192, 64\]"),
    ("granite_hybrid", {"num_local_experts": 4}, r"num_local_experts=4 is not supported"),
    ("granite_hybrid_rope", {"tie_word_embeddings": True}, r"lm_head\.weight differs from model\.embed_tokens\.weight, but config\.json ties them"),
    ("granite_dense", {"layer_types": ["attention"] * 3, "num_hidden_layers": 3}, r"holds model\.layers\.3\."),
    ("nemotron_h", {"hybrid_override_pattern": "M-M*M-M-"}, r"lacks backbone\.layers\.6\.mixer\.A_log"),
    ("nemotron_h", {"hybrid_override_pattern": "M-M*M-*", "num_hidden_layers": 7}, r"holds backbone\.layers\.7\.mixer\.down_proj\.weight"),
    ("nemotron_h", {"ssm_state_size": 32}, r"layers\.0\.mixer\.in_proj\.weight has shape"),
    ("mistral", {"head_dim": 16}, r"self_attn\.q_proj\.weight has shape \[128, 64\], but config\.json says \[64, 64\]"),
]


@pytest.mark.parametrize(("name", "changes", "message"), CONTRADICTIONS, ids=[f"{name}-{next(iter(changes))}" for name, changes, _ in CONTRADICTIONS])
def test_a_config_that_contradicts_its_weights_is_refused(name, changes, message, tmp_path):
    source = write_tiny(name, tmp_path / "hf")
    edit_config(source, **changes)
    refused(source, tmp_path, message)


@pytest.mark.parametrize(("name", "tensor"), [("granite_hybrid", "model.layers.2.mamba.A_log"), ("nemotron_h", "backbone.layers.2.mixer.dt_bias")])
def test_a_tensor_of_another_shape_or_missing_is_refused_by_its_name(name, tensor, tmp_path):
    source = write_tiny(name, tmp_path / "hf")
    change(source, lambda tensors: tensors.update({tensor: torch.zeros(9)}))
    refused(source, tmp_path, re.escape(f"{tensor} has shape [9], but config.json says [8]"))
    change(source, lambda tensors: tensors.pop(tensor))
    refused(source, tmp_path, re.escape(f"lacks {tensor}"))


@pytest.mark.parametrize("name", ["granite_hybrid", "nemotron_h", "mistral"])
def test_missing_and_truncated_shards_are_refused_by_their_name(name, tmp_path):
    source = write_tiny(name, tmp_path / "hf", max_shard_size="100KB")
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-64])
    refused(source, tmp_path, f"{shard.name} is truncated")
    shard.unlink()
    refused(source, tmp_path, f"{shard.name} is missing")


@pytest.mark.parametrize("model_type", ["granitemoe", "bamba", "mamba2", None])
def test_an_unknown_architecture_is_refused_before_anything_is_written(model_type, tmp_path):
    source = write_tiny("granite_hybrid", tmp_path / "hf")
    (source / "config.json").write_text(json.dumps({**TINY["granite_hybrid"], "model_type": model_type}))
    refused(source, tmp_path, f"model_type={model_type!r} is not supported; this version has granite, granitemoehybrid, llama")
    assert not (tmp_path / "out").exists()


def test_the_command_line_says_it_in_one_message(tmp_path):
    source = write_tiny("nemotron_h", tmp_path / "hf")
    edit_config(source, hybrid_override_pattern="M-MEM-*-")
    done = prism("convert", "import", source, tmp_path / "out")
    assert done.returncode == 2 and "no experts" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
