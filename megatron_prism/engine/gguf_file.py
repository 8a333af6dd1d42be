"""GGUF files of LLaMA models, made into Hugging Face folders: dequantised weights, config and tokenizer.

Owns: the tensor names of llama.cpp, the row order of its query and key projections, and dequantising one tensor at a time.
transformers reads config and tokenizer; it is not used for the weights, which it would hold in memory all at once (and only with accelerate).
Refuses: other architectures, tensors that it does not know, and rope factors that the file's config does not explain.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from megatron_prism import families
from megatron_prism.engine import hf
from megatron_prism.errors import UserError
from megatron_prism.families.model_config import ModelConfig

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""llama.cpp's name -> Hugging Face's, both inside their layer where there is one"""


def to_hf(path: Path, folder: Path, dtype: torch.dtype | None = None, like: Path | None = None) -> Path:
    """Write a Hugging Face folder with the dequantised model of a .gguf file, in float32 unless `dtype` says otherwise.

    like: a Hugging Face folder whose config and tokenizer are taken instead of the file's own. Errors: UserError naming what cannot be read.
    """
    from gguf import GGUFReader

    if not path.is_file():
        raise UserError(f"{path} does not exist; give the path of a .gguf file")
    try:
        reader = GGUFReader(path)
    except ValueError as error:
        raise UserError(f"{path} is truncated or no GGUF file ({error})") from None
    folder.mkdir(parents=True, exist_ok=True)
    if like is not None:
        hf.carry_files(like, folder)
    else:
        _write_config(path, reader, folder)
    _, model = families.load(folder)
    tensors = {_hf_name(item.name): item for item in reader.tensors if item.name != "rope_freqs.weight"}
    dtype = dtype or torch.float32
    plan = [hf.Planned(name, tuple(int(size) for size in reversed(item.shape)), dtype) for name, item in tensors.items()]
    hf.write_weights(folder, plan, _tensors(tensors, model))
    hf.declare_dtype(folder / "config.json", dtype)
    return folder


def _write_config(path: Path, reader: "GGUFReader", folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    if any(item.name == "rope_freqs.weight" for item in reader.tensors):
        raise UserError(
            f"{path} scales its rotary embeddings by stored factors (rope_freqs.weight), which its config does not name; give --like HF_DIR"
        )
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{path} cannot be read by transformers: {error}") from None
    families.find(config.to_dict())
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _hf_name(name: str) -> str:
    layer = re.match(r"blk\.(\d+)\.", name)
    stem, _, kind = name[layer.end() if layer else 0 :].rpartition(".")
    if stem not in NAMES:
        raise UserError(f"GGUF tensor {name} is not part of a LLaMA model; this version reads LLaMA models only")
    return (f"model.layers.{layer[1]}." if layer else "") + f"{NAMES[stem]}.{kind}"


def _tensors(tensors: dict[str, "ReaderTensor"], model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    from gguf import dequantize

    heads = {"q_proj": model.num_attention_heads, "k_proj": model.num_query_groups}
    for name, item in tensors.items():
        values = dequantize(item.data, item.tensor_type)
        projection = name.split(".")[-2]
        if projection in heads:
            values = halves(values, heads[projection])
        yield name, torch.from_numpy(np.require(values, requirements=["C", "W"]))


def halves(rows: "np.ndarray[Any, Any]", heads: int) -> "np.ndarray[Any, Any]":
    """Query or key rows [heads * 2n, ...] from llama.cpp's order (rotary pairs side by side) to Hugging Face's (first halves, then second)."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
