"""How many rows a device holds: by what the caches of real models take, which is measured."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import write_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_prism.engine.verify import without_cuda_kernels
from megatron_prism.generate.interface import Request
from megatron_prism.generate.room import Fitted, cache_bytes_per_token, rows_in_memory


@pytest.mark.parametrize("name", ["llama", "granite_hybrid", "nemotron_h"])
def test_a_token_takes_what_a_cache_of_it_holds(name: str, tmp_path: Path) -> None:
    folder = write_tiny(name, tmp_path / "hf")
    with without_cuda_kernels(), torch.inference_mode():
        cache = AutoModelForCausalLM.from_pretrained(folder)(torch.arange(3, 13)[None], use_cache=True).past_key_values
    keys = [layer.keys for layer in cache.layers if getattr(layer, "keys", None) is not None]
    held = 2 * sum(key.numel() * key.element_size() for key in keys)
    assert held > 0 and cache_bytes_per_token(AutoConfig.from_pretrained(folder), 4) * 10 == held


def test_rows_fill_four_fifths_of_the_free_memory() -> None:
    config = SimpleNamespace(num_hidden_layers=32, num_key_value_heads=8, num_attention_heads=32, hidden_size=4096)
    per_token = cache_bytes_per_token(config, 2)
    assert per_token == 128 * 1024, "LLaMA-3.1-8B in bf16"
    long = [Fitted(Request((1,)), tuple(range(130_944)), 128), Fitted(Request((1,)), (1, 2), 128)]
    assert rows_in_memory(long, per_token, 120 * 2**30) == 6, "16 GiB each"
    assert rows_in_memory(long, per_token, 2**30) == 1, "one is tried"
    assert rows_in_memory(long[1:], per_token, 120 * 2**30) > 1000
