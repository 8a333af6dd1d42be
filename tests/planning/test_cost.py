"""Counts against published figures: parameters of the paper's models, and FLOPs per token in both conventions."""

import pytest

from megatron_prism.config import ParallelConfig
from megatron_prism.families.model_config import ModelConfig, RopeScaling
from megatron_prism.planning.cost import describe_run, flops_per_token, memory, num_parameters, peak_tflops
from megatron_prism.planning.layout import make_plan


def llama_8b(**changes: object) -> ModelConfig:
    values = {
        "family": "llama", "num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "num_attention_heads": 32, "num_query_groups": 8,
        "kv_channels": 128, "vocab_size": 128256, "max_position_embeddings": 131072, "layernorm_epsilon": 1e-5, "rotary_base": 5e5,
        "rope_scaling": RopeScaling("llama3", 8.0),
    }  # fmt: skip
    return ModelConfig(**{**values, **changes})


MISTRAL_7B = llama_8b(vocab_size=32000)
MISTRAL_24B = llama_8b(num_layers=40, hidden_size=5120, ffn_hidden_size=32768, vocab_size=131072)


@pytest.mark.parametrize(("model", "billions"), [(llama_8b(), 8.030), (MISTRAL_7B, 7.242), (MISTRAL_24B, 23.572)])
def test_parameters_are_the_published_ones(model, billions):
    assert round(num_parameters(model) / 1e9, 3) == billions


def test_parameters_equal_those_of_transformers_with_biases_and_tied_embeddings():
    from transformers import AutoModelForCausalLM, LlamaConfig

    from megatron_prism import families

    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=12, vocab_size=61,
        attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
    )  # fmt: skip
    model = families.find(config.to_dict()).model_config(config.to_dict())
    assert num_parameters(model) == AutoModelForCausalLM.from_config(config).num_parameters()


def test_flops_per_token_follow_both_conventions_of_the_field():
    """LLaMA-3-8B, GFLOP per token: 51.47 causal and 57.91 full at 8,192 tokens; 148.1 and 251.2 at 131,072 (Megatron-LM's and NeMo's formulas)."""
    found = [round(flops_per_token(llama_8b(), length, causal) / 1e9, 2) for length in (8192, 131072) for causal in (True, False)]
    assert found == pytest.approx([51.47, 57.91, 148.1, 251.2], rel=2e-3)


def test_memory_counts_bytes_by_kind():
    plan = make_plan(llama_8b(), ParallelConfig(), world_size=8, seq_len=8192, global_batch=8, micro_batch=1)
    need = memory(llama_8b(), plan, 8192, bf16=True, recompute="full")
    weights = num_parameters(llama_8b())
    assert need.weights == 2 * weights
    assert need.gradients == 4 * weights
    assert need.optimizer == 12 * weights // 8
    assert need.total == need.weights + need.gradients + need.optimizer + need.activations


def test_recompute_and_sequence_parallelism_lower_the_activations():
    def activations(recompute: str | None, **parallel: object) -> int:
        plan = make_plan(llama_8b(), ParallelConfig(**parallel), world_size=8, seq_len=8192, global_batch=8, micro_batch=1)
        return memory(llama_8b(), plan, 8192, bf16=True, recompute=recompute).activations

    assert activations("full", tp=4, sp=True) < activations(None, tp=4, sp=True) < activations(None, tp=4) < activations(None)


def test_dry_run_text_has_mesh_tokens_and_both_flop_conventions():
    plan = make_plan(llama_8b(), ParallelConfig(tp=2, sp=True, pp=4), world_size=128, seq_len=8192, global_batch=128, micro_batch=1)
    text = describe_run(llama_8b(), plan, 25_000, 128, 8192, bf16=True, recompute=None)
    assert "128 ranks: tp=2 sp pp=4 cp=1 dp=16" in text
    assert "8,030,261,248" in text
    assert "26,214,400,000" in text
    assert "causal attention" in text
    assert "full attention" in text


def test_peaks_are_known_by_device_name():
    assert peak_tflops("NVIDIA H200") == 989.0
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989.0
    assert peak_tflops("some other device") is None
