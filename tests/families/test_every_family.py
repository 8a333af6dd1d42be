"""Every family: what transformers creates is what the rules name, both forms of a config are one model, and what is not implemented is refused."""

import json

import pytest
import torch
from tiny_models import TINY

from megatron_prism import families


def of_transformers(config, folder):
    """{name in files: shape} of the model that transformers creates, tied tensors aside; and its config as transformers writes it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    loaded = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(loaded)
    rename = "backbone." if config["model_type"] == "nemotron_h" else "model."
    tensors = {name.replace("model.", rename, 1) if name.startswith("model.") else name: tuple(t.shape) for name, t in model.named_parameters()}
    loaded.save_pretrained(folder / "written")
    return tensors, families.read_config(folder / "written")


def of_rules(config):
    """The same, by our rules."""
    family = families.find(config)
    model = family.model_config(config)
    parts = [(part, entry.hf_layer) for entry in family.rules(model) for part in entry.rule.parts(model)]
    named = [(part.name.replace("{i}", str(layer)), part.shape) for part, layer in parts]
    assert len(dict(named)) == len(named), "a tensor is read twice"
    return dict(named), model


@pytest.mark.parametrize("name", TINY)
def test_rules_name_exactly_what_transformers_creates_and_both_forms_are_one_model(name, tmp_path):
    theirs, written = of_transformers(TINY[name], tmp_path / "hf")
    ours, model = of_rules(TINY[name])
    assert ours == theirs
    assert families.find(written).model_config(written) == model
    assert families.find(written).num_parameters(model) == sum(torch.Size(shape).numel() for shape in theirs.values())
