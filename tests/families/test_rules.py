"""Weight rules: what goes in comes out again, the order inside fused tensors is megatron-core's, and every name has one rule."""

import dataclasses

import pytest
import torch
from tiny_models import BASE, VARIANTS

from megatron_prism.families.llama import LLAMA
from megatron_prism.families.rules import FuseGateUp, FuseQKV, holds

CONFIG = {"model_type": "llama", **BASE}


def model_of(name):
    return LLAMA.model_config({**CONFIG, **{key: value for key, value in VARIANTS[name].items() if key != "dtype"}})


@pytest.mark.parametrize("name", VARIANTS)
def test_split_inverts_sections_for_every_rule(name):
    model = model_of(name)
    for entry in LLAMA.rules(model):
        tensors = [torch.randn(part.shape) for part in entry.rule.parts(model)]
        fused = torch.cat(entry.rule.sections(tensors, model))
        assert fused.shape == entry.rule.shape(model)
        for there, back in zip(tensors, entry.rule.split(fused, model), strict=True):
            assert torch.equal(there, back)


def test_qkv_is_ordered_by_query_group():
    model = model_of("head_dim_apart")  # 8 query heads, 4 groups, head_dim 10
    rule = FuseQKV(hf="{qkv}", key="qkv", columns=("hidden_size",))
    heads = {"q": 8, "k": 4, "v": 4}
    tensors = [torch.arange(count).repeat_interleave(10)[:, None] + start for count, start in zip(heads.values(), (100, 200, 300), strict=True)]
    (fused,) = rule.sections([tensor.expand(-1, 32) for tensor in tensors], model)
    assert fused[::10, 0].tolist() == [100, 101, 200, 300, 102, 103, 201, 301, 104, 105, 202, 302, 106, 107, 203, 303]


def test_gate_comes_before_up_and_is_not_copied():
    model = model_of("untied")
    gate, up = torch.zeros(48, 32), torch.ones(48, 32)
    sections = FuseGateUp(hf="{gate_up}", key="fc1", columns=("hidden_size",)).sections([gate, up], model)
    assert sections[0] is gate and sections[1] is up


def test_conditions_read_both_ways():
    model = model_of("untied")
    tied = dataclasses.replace(model, share_embeddings_and_output_weights=True)
    name = "share_embeddings_and_output_weights"
    assert [holds(when, each) for each in (model, tied) for when in (name, f"not {name}", None)] == [False, True, True, True, False, True]


@pytest.mark.parametrize("name", VARIANTS)
def test_rules_name_exactly_the_tensors_of_transformers(name):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = model_of(name)
    with torch.device("meta"):
        theirs = LlamaForCausalLM(LlamaConfig(**{**BASE, **{key: value for key, value in VARIANTS[name].items() if key != "dtype"}}))
    wanted = {key: tuple(value.shape) for key, value in theirs.named_parameters()}
    ours = {}
    for entry in LLAMA.rules(model):
        for part in entry.rule.parts(model):
            ours[part.name.replace("{i}", str(entry.layer))] = part.shape
    assert ours == wanted
