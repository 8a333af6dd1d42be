"""Bytes by kind: exact where they are exact, and the total against what H200s reported (docs/benchmarks.md; bare megatron-core where said)."""

from dataclasses import replace

import pytest
from paper_models import GRANITE_4_H_MICRO, LLAMA_8B, NEMOTRON_H_8B

from megatron_prism.config import ParallelConfig
from megatron_prism.families.model_config import ModelConfig
from megatron_prism.planning.cost import MemoryPlan, memory, num_parameters
from megatron_prism.planning.layout import make_plan

LLAMA_8_LAYERS = replace(LLAMA_8B, num_layers=8, vocab_size=32000)
HYBRID_13_LAYERS = replace(NEMOTRON_H_8B, num_layers=13, hybrid_layer_pattern="M-M-M-M*-M-M-", vocab_size=32000)


def need(model: ModelConfig, world_size: int = 8, recompute: str | None = None, bf16: bool = True, batch: int = 8, **parallel: object) -> MemoryPlan:
    plan = make_plan(model, ParallelConfig(**parallel), world_size, 8192, global_batch=batch, micro_batch=1)
    return memory(model, plan, 8192, bf16, recompute)


@pytest.mark.parametrize(
    ("model", "world_size", "parallel", "gib"),
    [
        (LLAMA_8_LAYERS, 1, {}, 44.8),
        (LLAMA_8_LAYERS, 2, {}, 33.6),
        # bare megatron-core with TransformerEngine's cross-entropy, which keeps a logit's 2 bytes where ours takes 8
        (LLAMA_8_LAYERS, 2, {"tp": 2, "sp": True}, 21.8 + 8192 * 16000 * 6 / 2**30),
        (HYBRID_13_LAYERS, 1, {}, 44.5 + 8192 * 32000 * 6 / 2**30),
    ],
)
def test_the_estimate_is_what_h200s_used(model, world_size, parallel, gib):
    assert need(model, world_size, **parallel).total / 2**30 == pytest.approx(gib, rel=0.03)


def test_state_is_counted_exactly_by_kind():
    weights = num_parameters(LLAMA_8B)
    found = need(LLAMA_8B, recompute="full")
    assert (found.weights, found.gradients, found.optimizer) == (2 * weights, 4 * weights, 12 * weights // 8)
    assert found.total == found.weights + found.gradients + found.optimizer + found.activations
    fp32 = need(LLAMA_8B, bf16=False)
    assert (fp32.weights, fp32.gradients, fp32.optimizer) == (4 * weights, 4 * weights, 8 * weights // 8)


def test_recompute_and_sequence_parallelism_lower_the_activations():
    for model in (LLAMA_8B, NEMOTRON_H_8B, GRANITE_4_H_MICRO):
        cut = need(model, tp=4, sp=True).activations
        assert need(model, recompute="full", tp=4, sp=True).activations < cut < need(model, tp=4).activations < need(model).activations
        assert need(model, recompute="selective").activations == need(model).activations


def test_a_pipelines_stages_hold_the_model_once():
    """The fullest of them holds at least its part; the copy of a tied embedding on the last stage comes on top."""
    for model in (LLAMA_8B, GRANITE_4_H_MICRO):
        table = model.vocab_size * model.hidden_size
        extra = table if model.share_embeddings_and_output_weights else 0
        assert need(model, 2, batch=1, pp=2).weights >= num_parameters(model)  # 2 bytes of half the weights
        assert need(model, 2, batch=1, pp=2).weights <= num_parameters(model) + 2 * (table + extra)


def test_a_shorter_last_stage_makes_room_for_the_logits():
    even = need(LLAMA_8B, 4, batch=1, pp=4, recompute="full")
    last_is_short = need(LLAMA_8B, 4, batch=1, pp=4, recompute="full", num_layers_in_last_pipeline_stage=5)
    assert last_is_short.total < even.total


def test_the_first_stage_keeps_a_micro_batch_for_each_stage_after_it():
    one, many = (need(LLAMA_8B, 4, batch=batch, pp=4).activations for batch in (1, 8))
    assert many > 2 * one
    assert need(LLAMA_8B, 4, batch=8, pp=4, vpp=2).activations > many  # interleaving warms up more


def test_an_estimate_fits_when_a_tenth_stays_free():
    gib = need(LLAMA_8B).total / 2**30
    assert need(LLAMA_8B).fits(gib / 0.9 + 0.1)
    assert not need(LLAMA_8B).fits(gib / 0.9 - 0.1)
