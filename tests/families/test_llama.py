"""The LLaMA family reads what transformers reads from a config.json, and refuses by name what it does not implement."""

import json

import pytest
from tiny_models import BASE, LLAMA3, VARIANTS

from megatron_prism import families
from megatron_prism.errors import UserError
from megatron_prism.families.llama import LLAMA
from megatron_prism.families.model_config import RopeScaling

CONFIG = {"model_type": "llama", "hidden_act": "silu", **BASE}
LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}


def test_llama_3_1_8b_has_its_published_size():
    model = families.find(LLAMA_3_1_8B).model_config(LLAMA_3_1_8B)
    assert LLAMA.num_parameters(model) == 8_030_261_248
    assert model.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert (model.rotary_base, model.kv_channels, model.num_query_groups) == (500_000.0, 128, 8)


def test_both_forms_of_the_rope_config_are_one_model():
    old = {**CONFIG, "rope_theta": 5e5, "rope_scaling": LLAMA3}
    new = {**CONFIG, "rope_parameters": {"rope_theta": 5e5, **LLAMA3}}
    older = {**CONFIG, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}
    assert LLAMA.model_config(old) == LLAMA.model_config(new)
    assert LLAMA.model_config(older).rope_scaling == RopeScaling("linear", 2.0)
    assert LLAMA.model_config({**CONFIG, "rope_theta": 1e6, "rope_scaling": None}).rotary_base == 1e6


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_are_counted_as_transformers_counts_them(name):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**BASE, **{key: value for key, value in VARIANTS[name].items() if key != "dtype"}})
    with torch.device("meta"):
        wanted = sum(parameter.numel() for parameter in LlamaForCausalLM(config).parameters())
    model = LLAMA.model_config(json.loads(config.to_json_string(use_diff=False)))
    assert LLAMA.num_parameters(model) == wanted


def test_missing_keys_have_transformers_defaults():
    bare = {key: CONFIG[key] for key in ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    model = LLAMA.model_config(bare)
    assert (model.num_query_groups, model.kv_channels, model.layernorm_epsilon, model.rotary_base) == (8, 4, 1e-6, 10_000.0)
    assert not model.share_embeddings_and_output_weights and model.max_position_embeddings == 2048


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0, "attention_factor": 2.0}}, "attention_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"pretraining_tp": 2}, "pretraining_tp=2"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"num_experts": 8}, "num_experts"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"hidden_size": "big"}, "hidden_size='big'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"model_type": "gpt2"}, "gpt2"),
        ({"vocab_size": None}, "vocab_size"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(changes, named):
    config = {**CONFIG, **changes}
    with pytest.raises(UserError, match=named):
        families.find(config).model_config(config)


def test_unknown_keys_that_are_off_pass():
    assert LLAMA.model_config({**CONFIG, "sliding_window": None, "use_mrope": False, "_private": 3}) == LLAMA.model_config(CONFIG)


def test_a_folder_without_a_readable_config_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        families.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        families.load(tmp_path)
