"""Counts against published figures and against transformers: parameters of every family, whole and on one rank; and the text of a dry run."""

import re
from dataclasses import replace

import pytest
from paper_models import BILLIONS, GRANITE_4_H_MICRO, LLAMA_8B, NEMOTRON_H_8B
from tiny_models import TINY

from megatron_prism import families
from megatron_prism.config import Fp8Config, OptimizerConfig, ParallelConfig
from megatron_prism.planning.cost import Training, describe_run, layer_parameters, num_parameters, parameters_by_part, peak_tflops
from megatron_prism.planning.layout import make_plan


@pytest.mark.parametrize("name", BILLIONS)
def test_parameters_are_the_published_ones(name):
    model, billions = BILLIONS[name]
    assert round(num_parameters(model) / 1e9, 3) == billions


@pytest.mark.parametrize("name", families.PUBLISHED)
def test_every_published_config_has_as_many_parameters_as_its_weight_rules_and_as_the_model_written_by_hand(name):
    family = families.find(families.published(name))
    model = family.model_config(families.published(name))
    assert num_parameters(model) == family.num_parameters(model)
    by_hand = [model for short, (model, _) in BILLIONS.items() if name.startswith(short)]
    assert [num_parameters(model) for model in by_hand] == [num_parameters(model)]


@pytest.mark.parametrize("name", TINY)
def test_parameters_are_those_of_the_weight_rules_with_every_odd_feature(name):
    family = families.find(TINY[name])
    model = family.model_config(TINY[name])
    assert num_parameters(model) == family.num_parameters(model)


def test_parameters_equal_those_of_transformers_with_biases_and_tied_embeddings():
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=12, vocab_size=61,
        attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
    )  # fmt: skip
    model = families.find(config.to_dict()).model_config(config.to_dict())
    assert num_parameters(model) == AutoModelForCausalLM.from_config(config).num_parameters()


def test_parts_are_told_apart():
    parts = parameters_by_part(NEMOTRON_H_8B)
    assert list(parts) == ["embedding", "LM head", "Mamba-2", "MLP", "attention", "norms"]
    assert parts["MLP"] == 24 * 2 * 4096 * 21504
    assert parts["norms"] == 53 * 4096
    assert parameters_by_part(GRANITE_4_H_MICRO)["LM head"] == 0


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_the_ranks_of_a_layer_hold_it_whole_and_the_norm_each(tp):
    for symbol in "*-":
        assert tp * (layer_parameters(NEMOTRON_H_8B, symbol, tp) - 4096) == layer_parameters(NEMOTRON_H_8B, symbol) - 4096
    mamba = tp * (layer_parameters(NEMOTRON_H_8B, "M", tp) - 4096)
    assert mamba == layer_parameters(NEMOTRON_H_8B, "M") - 4096


def test_ranks_that_outnumber_the_groups_each_hold_all_of_b_and_c():
    """Their rows of the input projection, and of the convolution with its bias."""
    model, bc_size = GRANITE_4_H_MICRO, 2 * 128
    whole, half = (layer_parameters(model, "M", tp) - model.hidden_size for tp in (1, 2))
    assert 2 * half - whole == bc_size * (model.hidden_size + 4 + 1)
    several = replace(NEMOTRON_H_8B, mamba=replace(NEMOTRON_H_8B.mamba, num_groups=2))
    assert 4 * (layer_parameters(several, "M", 4) - 4096) - (layer_parameters(several, "M") - 4096) == 3 * 2 * bc_size * (4096 + 5)


def test_dry_run_text_has_mesh_tokens_and_both_flop_conventions():
    plan = make_plan(LLAMA_8B, ParallelConfig(tp=2, sp=True, pp=4), world_size=128, seq_len=8192, global_batch=128, micro_batch=1)
    text = describe_run(LLAMA_8B, plan, 25_000, 128, 8192, Training(recompute="full"))
    assert "128 ranks: tp=2 sp pp=4 cp=1 dp=16" in text
    assert "8,030,261,248" in text
    assert "26,214,400,000" in text
    assert "causal attention" in text
    assert "full attention" in text
    assert "recompute=full adds" in text
    assert "2 a weight, 4 a gradient, 12 of optimizer over the data-parallel ranks" in text


def test_dry_run_text_follows_the_types_of_the_states_fp8_and_the_layers_that_run_again():
    plan = make_plan(LLAMA_8B, ParallelConfig(pp=4), world_size=4, seq_len=8192, global_batch=128, micro_batch=1)
    compact = OptimizerConfig(gradients="bf16", moments="bf16", split_master=True)
    training = Training(recompute="full", recompute_layers=3, optimizer=compact, fp8=Fp8Config())
    text = describe_run(LLAMA_8B, plan, 25_000, 128, 8192, training)
    assert "2 a weight (and 2 of FP8 copies in the layers), 2 a gradient, 6 of optimizer" in text
    assert "recompute=full of 12 of 32 layers adds" in text
    whole = describe_run(LLAMA_8B, plan, 25_000, 128, 8192, Training(recompute="full"))
    added = [float(re.search(r"adds ([\d.e+]+),", words)[1]) for words in (text, whole)]
    assert added[0] / added[1] == pytest.approx(12 / 32, rel=1e-3)


def test_peaks_are_known_by_device_name():
    assert peak_tflops("NVIDIA H200") == 989.0
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989.0
    assert peak_tflops("some other device") is None
