"""Every family: what transformers creates is what the rules name, both forms of a config are one model, and what is not implemented is refused."""

import dataclasses
import json

import pytest
import torch
from tiny_models import LLAMA3, TINY

from megatron_prism import families
from megatron_prism.errors import UserError
from megatron_prism.families.model_config import RopeScaling


def of_transformers(config, folder):
    """{name in files: shape} of the model that transformers creates, tied tensors aside; and its config as transformers writes it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    loaded = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(loaded)
    base = "backbone." if config["model_type"] == "nemotron_h" else "model."  # transformers renames it when it loads and saves: test_written_names
    tensors = {name.replace("model.", base, 1): tuple(tensor.shape) for name, tensor in model.named_parameters()}
    loaded.save_pretrained(folder / "written")
    return tensors, families.read_config(folder / "written")


def of_rules(config):
    """The same, by our rules; no name twice."""
    model = read(config)
    entries = list(families.find(config).rules(model))
    named = [(part.name.replace("{i}", str(entry.hf_layer)), part.shape) for entry in entries for part in entry.rule.parts(model)]
    assert len(dict(named)) == len(named)
    return dict(named)


def read(config):
    return families.find(config).model_config(config)


@pytest.mark.parametrize("name", TINY)
def test_rules_name_exactly_what_transformers_creates_and_both_forms_are_one_model(name, tmp_path):
    theirs, written = of_transformers(TINY[name], tmp_path / "hf")
    assert of_rules(TINY[name]) == theirs
    assert read(written) == read(TINY[name])
    exported = families.export_config(written)
    assert read(exported) == read(TINY[name])
    assert of_transformers(exported, tmp_path / "exported")[1] == written  # the keys for older readers change nothing for transformers 5


SIZES = {
    "granite-3.3-8b-base": 8.171,
    "granite-4.0-micro-base": 3.403,
    "granite-4.0-h-micro-base": 3.191,
    "llama-3.1-8b": 8.030,
    "mistral-7b-v0.1": 7.242,
    "mistral-small-24b-base-2501": 23.572,
    "nemotron-h-8b-base-8k": 8.101,
    "smollm3-3b-base": 3.075,
}
"""billions of parameters; SmolLM3's by hand: (10,485,760 + 67,633,152 + 4,096) * 36 + 128,256 * 2,048 + 2,048"""


@pytest.mark.parametrize("name", families.PUBLISHED)
def test_published_models_have_their_true_size_and_every_tensor_of_transformers(name, tmp_path):
    config = families.published(name)
    model, family = read(config), families.find(config)
    assert round(family.num_parameters(model) / 1e9, 3) == SIZES[name]
    theirs, written = of_transformers(config, tmp_path / "hf")
    assert of_rules(config) == theirs
    assert family.num_parameters(model) == sum(torch.Size(shape).numel() for shape in theirs.values())
    assert read(written) == model
    assert families.export_config(config) == config and config["_source"]


@pytest.mark.parametrize("name", families.PUBLISHED)
def test_published_models_can_be_cut_over_many_ranks_and_put_together_again(name):
    """Shapes alone, on the meta device. A Mamba mixer's tensors are whole here: the mixer cuts them itself."""
    ranks = 4 if name == "smollm3-3b-base" else 8  # it has 4 key and value heads
    model, family = read(families.published(name)), families.find(families.published(name))
    for rule in {entry.rule.key: entry.rule for entry in family.rules(model)}.values():
        sections = rule.sections([torch.empty(part.shape, device="meta") for part in rule.parts(model)], model)
        whole = torch.cat(sections)
        assert whole.shape == rule.shape(model)
        assert [tuple(tensor.shape) for tensor in rule.split(whole, model)] == [part.shape for part in rule.parts(model)]
        if rule.tp_axis is not None:
            assert all(section.shape[rule.tp_axis] % ranks == 0 for section in sections), rule.key
    assert model.num_query_groups % ranks == 0 and (model.mamba is None or model.mamba.num_heads % ranks == 0)


def test_all_models_of_the_paper_and_smollm3_are_there():
    assert set(families.PUBLISHED) == set(SIZES)
    with pytest.raises(UserError, match=r"'gpt-4'.*llama-3\.1-8b"):
        families.published("gpt-4")


def test_published_models_read_as_the_paper_describes_them():
    hybrid, nemotron = read(families.published("granite-4.0-h-micro-base")), read(families.published("nemotron-h-8b-base-8k"))
    mixers = hybrid.hybrid_layer_pattern[::2]
    assert [layer for layer in range(40) if mixers[layer] == "*"] == [5, 15, 25, 35] and set(hybrid.hybrid_layer_pattern[1::2]) == {"-"}
    assert (hybrid.num_layers, hybrid.layers_per_block, hybrid.mamba.in_proj_size, hybrid.mamba.norm_groups) == (80, 2, 2 * 4096 + 256 + 64, 1)
    assert (hybrid.embedding_multiplier, hybrid.residual_multiplier, hybrid.softmax_scale, hybrid.logits_scaling) == (12, 0.22, 1 / 64, 8)
    assert hybrid.position_embedding == nemotron.position_embedding == "none"
    assert [layer for layer in range(52) if nemotron.hybrid_layer_pattern[layer] == "*"] == [7, 18, 29, 40]
    assert (nemotron.num_layers, nemotron.activation, nemotron.mamba.d_inner, nemotron.mamba.norm_groups) == (52, "squared_relu", 8192, 8)
    assert nemotron.mamba.time_step_limit == (0.001, float("inf")) and hybrid.mamba.time_step_limit == (0.0, float("inf"))
    dense = read(families.published("granite-4.0-micro-base"))
    assert not dense.is_hybrid and dense.mamba is None and (dense.num_layers, dense.position_embedding, dense.rotary_base) == (40, "rope", 1e7)
    small, seven = read(families.published("mistral-small-24b-base-2501")), read(families.published("mistral-7b-v0.1"))
    assert (small.kv_channels, small.sliding_window, seven.kv_channels, seven.sliding_window) == (128, None, 128, 4096)
    assert read(families.published("smollm3-3b-base")).no_rope_layers == tuple(range(3, 36, 4))


def test_transformers_writes_the_names_that_nemotron_h_is_published_with(tmp_path):
    from safetensors import safe_open
    from tiny_models import write_tiny

    folder = write_tiny("nemotron_h", tmp_path / "hf")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == of_rules(TINY["nemotron_h"]).keys()


# --- what is left out of a config ---------------------------------------------------------------------------------------------------------------

OPTIONAL = {
    "mistral": "head_dim sliding_window num_key_value_heads max_position_embeddings rms_norm_eps rope_theta tie_word_embeddings",
    "granite": "embedding_multiplier residual_multiplier attention_multiplier logits_scaling tie_word_embeddings rope_theta num_key_value_heads",
    "granite_hybrid": "layer_types shared_intermediate_size mamba_d_head mamba_n_groups mamba_d_conv mamba_chunk_size mamba_conv_bias "
    "attention_multiplier position_embedding_type",
    "smollm3": "no_rope_layers no_rope_layer_interval num_key_value_heads max_position_embeddings rope_theta tie_word_embeddings use_sliding_window",
    "nemotron_h": "num_key_value_heads head_dim mamba_num_heads mamba_head_dim ssm_state_size n_groups conv_kernel chunk_size time_step_min "
    "use_conv_bias layer_norm_epsilon num_hidden_layers",
}


@pytest.mark.parametrize("name", OPTIONAL)
def test_missing_keys_have_transformers_defaults(name, tmp_path):
    """transformers writes every key, its defaults too: reading what it writes tells what it takes for a missing one."""
    bare = {key: value for key, value in TINY[name].items() if key not in OPTIONAL[name].split()} | {"num_attention_heads": 8}
    assert read(of_transformers(bare, tmp_path / "hf")[1]) == read(bare)


def test_an_explicit_null_is_no_sliding_window_and_an_absent_key_is_mistrals_first():
    absent = {key: value for key, value in TINY["mistral"].items() if key != "sliding_window"}
    assert read(absent).sliding_window == 4096 and read({**absent, "sliding_window": None}).sliding_window is None


@pytest.mark.parametrize("spelled", [[0.0, float("inf")], [0.0, {"__float__": "Infinity"}], (0, "Infinity"), None])
def test_every_spelling_of_no_time_step_limit_is_read(spelled):
    for name in ("granite_hybrid", "nemotron_h"):
        assert read({**TINY[name], "time_step_limit": spelled}) == read(TINY[name])


HARMLESS = {
    "granite_hybrid": {
        "init_method": "mup", "normalization_function": "rmsnorm", "router_aux_loss_coef": 0.01, "num_experts_per_tok": 8, "time_step_min": 0.001,
        "time_step_max": 0.1, "tokenizer_class": "GPT2Tokenizer",
    },
    "smollm3": {"pretraining_tp": 2, "max_window_layers": 28, "layer_types": ["full_attention"] * 4},
    "nemotron_h": {
        "auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"}, "num_logits_to_keep": 1, "num_query_groups": 8, "rms_norm_eps": 1e-5,
        "time_step_rank": 256, "use_mamba_kernels": True, "residual_in_fp32": True, "rescale_prenorm_residual": True, "expand": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_keys_of_published_configs_that_change_nothing_pass(name):
    assert read({**TINY[name], **HARMLESS[name]}) == read(TINY[name])


def test_layer_kinds_are_read_under_both_keys_and_names():
    config = TINY["granite_hybrid"]
    for key, kinds in [
        ("layers_block_type", ["mamba", "attention", "mamba", "mamba"]),
        ("layer_types", ["linear_attention", "full_attention", "linear_attention", "linear_attention"]),
    ]:
        other = {name: value for name, value in config.items() if name != "layer_types"} | {key: kinds}
        assert read(other) == read(config)
    nemotron = {key: value for key, value in TINY["nemotron_h"].items() if key not in ("hybrid_override_pattern", "num_hidden_layers")}
    names = {"M": "mamba", "*": "attention", "-": "mlp"}
    kinds = [names[symbol] for symbol in TINY["nemotron_h"]["hybrid_override_pattern"]]
    assert read({**nemotron, "layers_block_type": kinds}) == read(TINY["nemotron_h"])


# --- export -------------------------------------------------------------------------------------------------------------------------------------


def test_a_published_config_is_exported_as_it_is():
    for config in TINY.values():
        assert families.export_config(config) == config


def test_what_transformers_4_would_misread_is_exported_with_the_published_keys(tmp_path):
    _, written = of_transformers(TINY["llama"], tmp_path / "llama")
    exported = families.export_config(written)
    assert exported.items() >= written.items()
    assert exported["rope_theta"] == 500_000.0 and exported["rope_scaling"] == LLAMA3 and exported["torch_dtype"] == "float32"
    assert read({key: value for key, value in exported.items() if key != "rope_parameters"}).rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    _, written = of_transformers(TINY["granite_hybrid"], tmp_path / "granite")
    exported = families.export_config(written)
    assert exported["layer_types"] == ["mamba", "attention", "mamba", "mamba"] and exported["rope_theta"] == 1e7 and exported["rope_scaling"] is None
    assert families.export_config(exported) == exported


def test_nemotron_h_has_no_older_form(tmp_path):
    _, written = of_transformers(TINY["nemotron_h"], tmp_path / "hf")
    assert families.export_config(written) == written


# --- what is refused ----------------------------------------------------------------------------------------------------------------------------

REFUSED = [
    ("mistral", {"sliding_window": 0}, "sliding_window=0"),
    ("mistral", {"attention_bias": True}, "attention_bias"),
    ("mistral", {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
    ("granite", {"logits_scaling": 0}, "logits_scaling=0"),
    ("granite", {"attention_dropout": 0.1}, "attention_dropout=0.1.*acts in training alone"),
    ("granite", {"model_type": ["granite"]}, "model_type"),
    ("granite", {"rope_scaling": [4.0]}, "must be one object"),
    ("granite", {"rope_theta": "1e6"}, "rope_theta='1e6'"),
    ("granite", {"rope_theta": 1e7, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_theta=10000000.0 differs from"),
    ("granite", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ("granite_dense", {"attention_bias": True}, "attention_bias=True"),
    ("granite_hybrid", {"num_local_experts": 64}, "num_local_experts=64"),
    ("granite_hybrid", {"num_local_experts": None}, "num_local_experts"),
    ("granite_hybrid", {"mamba_proj_bias": True}, "mamba_proj_bias=True"),
    ("granite_hybrid", {"position_embedding_type": "alibi"}, "position_embedding_type='alibi'"),
    ("granite_hybrid", {"layer_types": ["mamba", "sliding_attention", "mamba", "mamba"]}, "sliding_attention"),
    ("granite_hybrid", {"layer_types": ["mamba"] * 5}, "num_hidden_layers=4"),
    ("granite_hybrid", {"layer_types": 4}, "layer_types=4"),
    ("granite_hybrid", {"mamba_d_head": 32}, "mamba_d_head=32"),
    ("granite_hybrid", {"mamba_n_groups": 3}, "mamba_n_groups=3"),
    ("granite_hybrid", {"mamba_conv_bias": "yes"}, "mamba_conv_bias='yes'"),
    ("granite_hybrid", {"time_step_limit": [1.0, 0.5]}, "time_step_limit"),
    ("granite_hybrid", {"time_step_limit": "wide"}, "time_step_limit='wide'"),
    ("granite_hybrid", {"normalization_function": "layernorm"}, "normalization_function='layernorm'"),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window"),
    ("smollm3", {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
    ("smollm3", {"no_rope_layers": [[1]] * 4}, "no_rope_layers"),
    ("nemotron_h", {"hybrid_override_pattern": "M-MEM-*-"}, "no experts"),
    ("nemotron_h", {"layers_block_type": ["mamba", "moe", "attention", "mlp"]}, "moe"),
    ("nemotron_h", {"layers_block_type": [["mamba"]]}, "layers_block_type"),
    ("nemotron_h", {"mamba_conv_bias": False}, "older name of use_conv_bias"),
    ("nemotron_h", {"mamba_dt_min": 0.0}, "older name of time_step_min"),
    ("nemotron_h", {"hybrid_override_pattern": "M-M*"}, "num_hidden_layers=8"),
    ("nemotron_h", {"hybrid_override_pattern": None}, "hybrid_override_pattern"),
    ("nemotron_h", {"tie_word_embeddings": True}, "tie_word_embeddings=True"),
    ("nemotron_h", {"use_bias": True}, "use_bias=True"),
    ("nemotron_h", {"mlp_bias": True}, "mlp_bias=True"),
    ("nemotron_h", {"mlp_hidden_act": "silu"}, "mlp_hidden_act='silu'"),
    ("nemotron_h", {"time_step_limit": [0.0, 0.5]}, "time_step_limit"),
    ("nemotron_h", {"attention_head_dim": 32}, "attention_head_dim=32"),
    ("nemotron_h", {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers=1"),
    ("nemotron_h", {"qk_layernorm": True}, "qk_layernorm"),
    ("nemotron_h", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("nemotron_h", {"sliding_window": 128}, "sliding_window"),
]


@pytest.mark.parametrize(("name", "changes", "named"), REFUSED, ids=[f"{name}-{next(iter(changes))}" for name, changes, _ in REFUSED])
def test_what_is_not_implemented_is_refused_by_name(name, changes, named):
    with pytest.raises(UserError, match=named):
        read({**TINY[name], **changes})


def test_every_field_of_the_mamba_block_comes_from_its_key():
    for name, keys in [
        ("granite_hybrid", {"mamba_d_state": "state_dim", "mamba_d_conv": "conv_kernel", "mamba_chunk_size": "chunk_size"}),
        ("nemotron_h", {"ssm_state_size": "state_dim", "conv_kernel": "conv_kernel", "chunk_size": "chunk_size", "mamba_head_dim": "head_dim"}),
    ]:
        for key, field in keys.items():
            assert read({**TINY[name], key: 12}).mamba == dataclasses.replace(read(TINY[name]).mamba, **{field: 12})
