"""Laws of a step's predicted time; what it predicts is held to measured runs in test_measured_runs.py."""

from dataclasses import replace

import pytest
from paper_models import GRANITE_8B, LLAMA_8B, MISTRAL_24B, NEMOTRON_H_8B

from megatron_prism.config import Fp8Config, OptimizerConfig, ParallelConfig
from megatron_prism.errors import UserError
from megatron_prism.planning import rates
from megatron_prism.planning.flops import forward_flops_by_kind
from megatron_prism.planning.layout import make_plan
from megatron_prism.planning.parameters import linear_parameters, num_parameters
from megatron_prism.planning.rates import H200
from megatron_prism.planning.step_time import Machine, StepTime, step_time
from megatron_prism.planning.training import Training


def step(model=LLAMA_8B, gpus=8, batch=64, training=None, seq_len=8192, machine=None, overlap=False, **parallel) -> StepTime:
    plan = make_plan(model, ParallelConfig(**parallel), gpus, seq_len, batch, 1)
    return step_time(model, plan, seq_len, training or Training(), machine, overlap)


def test_products_and_attention_are_the_models_flops_over_the_rates():
    """LLaMA has no other work in FLOPs: three times the forward ones, attention's backward pass two and a half times."""
    found, flops, tokens = step(gpus=1, batch=4), forward_flops_by_kind(LLAMA_8B, 8192), 4 * 8192
    linear = flops["attention projections"] + flops["MLP"]
    assert found.products == pytest.approx(3 * linear * tokens / H200.products)
    core = flops["attention core"] * tokens
    assert found.attention == pytest.approx(core / H200.attention_forward + 2.5 * core / H200.attention_backward)
    head = 3 * flops["LM head"] * tokens / H200.products
    assert head < found.lm_head < 1.1 * head


def test_one_gpu_exchanges_nothing_and_a_dense_model_scans_nothing():
    found = step(gpus=1, batch=4)
    assert (found.tp_exchange, found.cp_exchange, found.pp_exchange, found.pp_bubble, found.dp_exchange, found.recompute, found.scan) == (0,) * 7
    assert step(NEMOTRON_H_8B, gpus=1, batch=4).scan > 0


def test_a_step_takes_longer_by_its_micro_batches_and_the_optimizer_runs_once():
    one, four = step(batch=8), step(batch=32)
    assert four.products == pytest.approx(4 * one.products)
    assert (four.optimizer, four.overhead) == (one.optimizer, one.overhead)


def test_recomputation_repeats_the_forward_pass_and_keeping_attention_leaves_its_core_out():
    full, kept = (step(training=Training(recompute="full", keep_attention=keep)) for keep in (False, True))
    half = step(training=Training(recompute="full", recompute_layers=16))
    assert full.products / 3 < full.recompute < (full.products + full.attention + full.elementwise) / 2
    assert full.recompute - kept.recompute == pytest.approx(
        forward_flops_by_kind(LLAMA_8B, 8192)["attention core"] * 8 * 8192 / H200.attention_forward
    )
    assert half.recompute == pytest.approx(full.recompute / 2)
    assert step(training=Training(recompute="selective")).recompute == pytest.approx(full.recompute - kept.recompute)


def test_a_pipelines_bubble_is_its_stages_less_one_over_the_micro_batches_and_chunks_divide_it():
    """32 layers of one kind; the head on the last stage makes it the slowest."""
    found, chunked = step(pp=4, batch=64), step(pp=4, vpp=4, batch=64)  # dp = 2: 32 micro-batches
    busy = found.total - found.pp_bubble - found.optimizer - found.overhead - found.dp_exchange
    assert found.pp_bubble / busy == pytest.approx(3 / 32)
    assert chunked.pp_bubble == pytest.approx(found.pp_bubble / 4, rel=0.02)
    assert chunked.pp_exchange == pytest.approx(4 * found.pp_exchange)


def test_the_slowest_stage_sets_the_pace():
    ends = {"num_layers_in_first_pipeline_stage": 17, "num_layers_in_last_pipeline_stage": 15}
    even, uneven = step(pp=2, batch=64), step(pp=2, batch=64, **ends)
    assert uneven.total < even.total  # the last stage has the head


def test_overlap_hides_a_part_of_tensor_parallelisms_exchange_and_nothing_else():
    plain, beside = step(tp=2, sp=True), step(tp=2, sp=True, overlap=True)
    assert beside.tp_exchange == pytest.approx((1 - H200.overlap_hides) * plain.tp_exchange)
    assert replace(beside, tp_exchange=plain.tp_exchange) == plain


def test_a_slow_network_shows_where_the_backward_pass_no_longer_hides_it():
    shown = [step(gpus=64, batch=64, machine=Machine(network_gbps=gbps)).dp_exchange for gbps in (400, 20, 10)]
    assert shown[0] == 0 < shown[1] < shown[2]
    weights = num_parameters(LLAMA_8B)
    rate = 8 * 10e9 / 8  # 8 adapters of a node, in bytes
    assert shown[2] < 63 / 64 * weights * (4 + 2) / rate < shown[2] + step(gpus=64, batch=64).total
    assert step(gpus=8, batch=64, machine=Machine(network_gbps=1)).dp_exchange == 0  # one node has none


def test_fp8_makes_products_quicker_and_attention_not():
    plain = step()
    found = {recipe: step(training=Training(fp8=Fp8Config(recipe=recipe))) for recipe in ("delayed", "tensorwise", "blockwise")}
    assert found["delayed"].products < found["tensorwise"].products < found["blockwise"].products < plain.products
    assert {other.attention for other in found.values()} == {plain.attention}


def test_the_optimizer_moves_its_bytes_over_the_ranks_that_share_it():
    """30 bytes a parameter of AdamW with fp32 states, 20 with small ones (docs/benchmarks.md), 4 of the norm and 4 of clearing."""
    small = Training(optimizer=OptimizerConfig(moments="bf16", split_master=True))
    weights = num_parameters(LLAMA_8B)
    assert step(gpus=1).optimizer == pytest.approx(weights * (30 + 4 + 4) / H200.memory, rel=1e-3)
    assert step(gpus=8, training=small).optimizer == pytest.approx(weights * ((20 + 4) / 8 + 4) / H200.memory, rel=1e-3)


def test_frozen_weights_take_no_gradient():
    frozen = step(training=Training(trainable="attention"))
    assert frozen.products < step().products
    assert frozen.optimizer < step().optimizer / 4


def test_a_tied_head_is_stepped_once():
    whole = step(GRANITE_8B, gpus=1).optimizer
    assert whole == pytest.approx(num_parameters(GRANITE_8B) * 38 / H200.memory, rel=1e-3)


def test_other_gpus_are_derived_by_a_stated_rule_or_refused():
    h100, scaled = rates.find("NVIDIA H100"), rates.find("b200", matmul_tflops=1570)
    assert rates.find("H200") is H200
    assert (h100.products, h100.memory) == (H200.products, pytest.approx(H200.memory * 3.35 / 4.8))
    assert (scaled.products, scaled.nvlink) == (pytest.approx(2 * H200.products), H200.nvlink)
    assert h100.note.startswith("not measured") and scaled.note.startswith("not measured")
    assert step(MISTRAL_24B, machine=Machine(h100), tp=8, sp=True).total > step(MISTRAL_24B, tp=8, sp=True).total
    with pytest.raises(UserError, match="--gpu A100: no rates for this GPU"):
        rates.find("A100")


def test_with_cuda_graphs_the_whole_exchange_of_dp_shows_and_nothing_else_changes():
    """A gradient is 4 bytes out and a weight 2 bytes in, less the rank's own share."""
    plain, graphs = (step(gpus=8, batch=8, training=Training(cuda_graphs=on)) for on in (False, True))
    assert plain.dp_exchange == 0
    assert graphs.dp_exchange == pytest.approx(num_parameters(LLAMA_8B) * 6 * 7 / 8 / H200.nvlink, rel=1e-3)
    assert replace(graphs, dp_exchange=0.0) == plain
    assert step(gpus=1, batch=1, training=Training(cuda_graphs=True)) == step(gpus=1, batch=1)


def test_weights_in_fp8_alone_are_gathered_in_one_byte_and_cast_by_the_ranks_that_share_masters():
    """With graphs, so that the whole exchange shows; every layer's linear weights, and neither norms nor tables."""
    linear = sum(linear_parameters(LLAMA_8B, symbol, 1) for symbols in LLAMA_8B.layer_symbols for symbol in symbols)
    for split, cast in ((False, 9), (True, 11)):
        kinds = [Training(fp8=Fp8Config(params=params), cuda_graphs=True, optimizer=OptimizerConfig(split_master=split)) for params in (False, True)]
        copied, alone = (step(training=training) for training in kinds)
        assert copied.dp_exchange - alone.dp_exchange == pytest.approx(linear * 7 / 8 / Machine().exchange_rate(8))
        assert alone.optimizer - copied.optimizer == pytest.approx(cast * linear / 8 / H200.memory)
        assert replace(alone, dp_exchange=0, optimizer=0) == replace(copied, dp_exchange=0, optimizer=0)
