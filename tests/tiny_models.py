"""Hugging Face folders of tiny random models of every family, with every odd feature on, for tests of conversion, forward pass and training.

from tiny_models import TINY, write_tiny
folder = write_tiny("granite_hybrid", tmp_path / "hf")

TINY holds each model's config.json in the form in which such models are published. Names that end in "_tp4" can be cut over four ranks
everywhere; the others have 2 key and value heads (or as few Mamba groups) and stop at two.
"""

import json
from pathlib import Path
from typing import Any

import torch

from megatron_prism.engine.verify import without_cuda_kernels

BASE = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "head_dim_apart": {"head_dim": 10},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3_rope": {"rope_parameters": {"rope_theta": 50_000.0, **LLAMA3}},
    "linear_rope": {"rope_parameters": {"rope_theta": 10_000.0, "rope_type": "linear", "factor": 4.0}},
    "one_kv_head": {"num_key_value_heads": 1},
    "as_many_kv_heads": {"num_key_value_heads": 8},
    "bf16": {"dtype": torch.bfloat16},
}

_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_DENSE = {
    **_IDS,
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}
_LLAMA = {**_DENSE, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False, "rope_theta": 500_000.0}
_MISTRAL = {
    **_DENSE,
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "head_dim": 32,
    "sliding_window": 5,
    "tie_word_embeddings": False,
}
_FACTORS = {"embedding_multiplier": 6.0, "residual_multiplier": 0.3, "attention_multiplier": 0.11, "logits_scaling": 3.0, "tie_word_embeddings": True}
_GRANITE = {**_DENSE, **_FACTORS, "architectures": ["GraniteForCausalLM"], "model_type": "granite", "rope_theta": 1e7}
_GRANITE_4 = {
    **_GRANITE,
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "model_type": "granitemoehybrid",
    "shared_intermediate_size": 96,
    "intermediate_size": 80,  # of the experts that there are not
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "position_embedding_type": "nope",
    "normalization_function": "rmsnorm",
    "init_method": "mup",
    "layer_types": ["mamba", "attention", "mamba", "mamba"],
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}
_SMOLLM3 = {
    **_DENSE,
    "architectures": ["SmolLM3ForCausalLM"],
    "model_type": "smollm3",
    "rope_theta": 5e6,
    "no_rope_layers": [1, 1, 1, 0],
    "no_rope_layer_interval": 4,
    "use_sliding_window": False,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "pretraining_tp": 2,
}
_NEMOTRON_H = {
    **{key: value for key, value in _DENSE.items() if key not in ("rms_norm_eps", "rope_theta", "hidden_act")},
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "M-M*M-*-",
    "num_hidden_layers": 8,
    "head_dim": 24,
    "layer_norm_epsilon": 1e-5,
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 8,
    "expand": 2,
    "time_step_min": 0.1,  # transformers' lower limit of the time step, within the range of these weights
    "time_step_max": 0.4,
    "time_step_limit": [0.0, float("inf")],
    "use_conv_bias": True,
    "residual_in_fp32": False,
    "tie_word_embeddings": False,
}
TINY: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA, "rope_scaling": LLAMA3},
    "llama_tp4": {**_LLAMA, "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": _MISTRAL,
    "mistral_tp4": {**_MISTRAL, "num_key_value_heads": 4, "sliding_window": None, "head_dim": 24, "tie_word_embeddings": True},
    "granite": _GRANITE,
    "granite_tp4": {**_GRANITE, "num_key_value_heads": 4, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "granite_dense": {**_GRANITE_4, "layer_types": ["attention"] * 4, "position_embedding_type": "rope"},
    "granite_dense_tp4": {**_GRANITE_4, "layer_types": ["attention"] * 4, "num_key_value_heads": 4, "tie_word_embeddings": False},
    "granite_hybrid": _GRANITE_4,
    "granite_hybrid_rope": {
        **_GRANITE_4,
        "position_embedding_type": "rope",
        "rope_theta": 20_000.0,
        "mamba_n_groups": 2,
        "mamba_conv_bias": False,
        "tie_word_embeddings": False,
        "time_step_limit": [0.1, 0.7],
        "layer_types": ["attention", "mamba", "attention", "mamba"],
    },
    "granite_hybrid_tp4": {**_GRANITE_4, "num_key_value_heads": 4, "mamba_n_groups": 4},
    "granite_hybrid_one_group_tp4": {**_GRANITE_4, "num_key_value_heads": 4},
    "smollm3": _SMOLLM3,
    "smollm3_tp4": {
        **_SMOLLM3,
        "num_key_value_heads": 4,
        "no_rope_layers": [0, 1, 0, 1],
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "nemotron_h": _NEMOTRON_H,
    "nemotron_h_one_group": {**_NEMOTRON_H, "n_groups": 1, "hybrid_override_pattern": "*-MM*M-M", "use_conv_bias": False},
    "nemotron_h_tp4": {**_NEMOTRON_H, "n_groups": 4, "num_key_value_heads": 4},
}
KEPT_FP32 = ("A_log", "D", "dt_bias")


def write_tiny(name: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, max_shard_size: str = "5GB", **changes: Any) -> Path:
    """A model of TINY (`changes`: other config.json keys) as its publisher would give it: random weights everywhere, tokenizer, config as in TINY.

    dtype: of the weights and the config; a Mamba mixer's A_log, D and dt_bias stay fp32. The files are the truth: transformers' own loader may
    initialise some parameters again.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {**TINY[name], "torch_dtype": str(dtype).removeprefix("torch."), **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    torch.manual_seed(seed)
    with without_cuda_kernels():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    randomize(model)
    for key, parameter in model.named_parameters():
        parameter.data = parameter.data if key.endswith(KEPT_FP32) else parameter.data.to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_tokenizer(folder, config["vocab_size"])
    return folder


def write_pairs(folder: Path) -> Path:
    """Two models each of a dense and a hybrid family: llama0, llama1, granite_hybrid0, granite_hybrid1."""
    for name in ("llama", "granite_hybrid"):
        for seed in (0, 1):
            write_tiny(name, folder / f"{name}{seed}", seed=seed)
    return folder


def imported(source: Path, output: Path, **values: Any) -> Path:
    """A checkpoint of a Hugging Face folder. values: other keys of the recipe of `prism convert`."""
    from megatron_prism.stages import convert

    return convert.run(convert.Config(direction="import", source=source, output=output, **values))


def randomize(model: torch.nn.Module) -> None:
    """Every parameter random, in the order of the names: norms and D around 1, time steps from about 0.02 to 0.9, biases too."""
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            center = 1.0 if "norm" in name or name.endswith(".D") else -1.5 if name.endswith("dt_bias") else 0.0
            scale = 1.0 if name.endswith(("dt_bias", "A_log")) else 0.2
            parameter.copy_(center + scale * torch.randn(parameter.shape))


def write_llama(folder: Path, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", seed: int = 0, **changes: Any) -> Path:
    """A model whose every parameter is random (transformers would leave biases 0 and norms 1), with tokenizer and chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**BASE, **changes})).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if "norm" in name else 0.0
            parameter.copy_(center + 0.2 * torch.randn(parameter.shape))
    model.config.dtype = dtype
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    _publish(folder / "config.json")
    write_tokenizer(folder, {**BASE, **changes}["vocab_size"])
    return folder


def _publish(path: Path) -> None:
    """The rotary embeddings of a config.json in the published form, which an export keeps byte for byte."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A word-level tokenizer of the model's size, and the other small files that a published model has."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{index}": index for index in range(3, vocab_size)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    wrapped.save_pretrained(folder)
    (folder / "README.md").write_text("a model card, naïve\n", encoding="utf-8")


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json (None removes one)."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}, indent=1))
