"""Hugging Face folders of tiny random LLaMA models, with every odd feature on, for conversion tests.

from tiny_models import VARIANTS, write_llama
folder = write_llama(tmp_path / "hf", **VARIANTS["biases"])
"""

import json
from pathlib import Path
from typing import Any

import torch

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
    write_tokenizer(folder, {**BASE, **changes}["vocab_size"])
    return folder


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
