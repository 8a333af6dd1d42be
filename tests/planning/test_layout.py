"""Every rule of a parallel plan, and that its message names the values and a fix."""

from dataclasses import replace

import pytest
from training import TINY_LLAMA

from megatron_prism import families
from megatron_prism.config import ParallelConfig
from megatron_prism.errors import UserError
from megatron_prism.families.model_config import MambaConfig
from megatron_prism.planning.layout import make_plan

MODEL = families.find(TINY_LLAMA).model_config(TINY_LLAMA)
HYBRID = replace(
    MODEL,
    num_layers=10,
    num_attention_heads=24,
    num_query_groups=24,
    hybrid_layer_pattern="M-M-*-M-M-",
    mamba=MambaConfig(num_heads=24, head_dim=4, state_dim=8, num_groups=4, conv_kernel=4, chunk_size=8, norm_groups=4),
)


def plan(world_size: int = 8, global_batch: int = 16, micro_batch: int = 1, seq_len: int = 32, **parallel: object):
    return make_plan(MODEL, ParallelConfig(**parallel), world_size, seq_len, global_batch, micro_batch)


def test_data_parallelism_and_micro_batches_follow_from_the_rest():
    found = plan(world_size=8, global_batch=16, micro_batch=2, tp=2, pp=2)
    assert (found.dp, found.num_microbatches, found.world_size, found.padded_vocab_size) == (2, 4, 8, 128)
    assert plan(tp=1).padded_vocab_size == 112


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tp": 3, "world_size": 3}, r"parallel\.tp=3 must divide num_attention_heads=4; try parallel\.tp=4"),
        ({"tp": 4}, r"parallel\.tp=4 must divide num_query_groups=2; try parallel\.tp=2"),
        ({"pp": 3, "world_size": 3}, r"parallel\.pp=3 must divide num_layers=4; try parallel\.pp=4"),
        (
            {"pp": 3, "world_size": 3, "num_layers_in_last_pipeline_stage": 1},
            r"num_layers_in_last_pipeline_stage=1 leaves 3 of num_layers=4 for the other 2 stages of parallel\.pp=3; the rest must divide evenly",
        ),
        ({"pp": 2, "num_layers_in_first_pipeline_stage": 4}, "leaves 0 of num_layers=4 for the other 1 stage .* at least one layer each"),
        ({"pp": 2, "num_layers_in_first_pipeline_stage": 2, "num_layers_in_last_pipeline_stage": 1}, "leaves 1 of num_layers=4 for the other 0"),
        ({"num_layers_in_first_pipeline_stage": 2}, r"num_layers_in_first_pipeline_stage=2 needs a pipeline"),
        ({"pp": 2, "vpp": 2, "num_layers_in_last_pipeline_stage": 1}, r"does not go with parallel\.vpp=2"),
        ({"pp": 4, "vpp": 2}, r"parallel\.pp=4 \* parallel\.vpp=2 must divide num_layers=4"),
        ({"vpp": 2}, "needs a pipeline"),
        ({"sp": True}, "needs tensor parallelism"),
        ({"tp": 2, "sp": True, "seq_len": 33}, r"must divide data\.seq_len=33"),
        ({"world_size": 6, "tp": 2, "pp": 2}, "must divide the 6 ranks of this launch; start 8 ranks"),
        ({"global_batch": 12}, "global_batch=12 must be a multiple of dp=8.*try global_batch=16"),
        ({"world_size": 2, "global_batch": 3, "pp": 2, "vpp": 2}, r"must be a multiple of parallel\.pp=2; try global_batch=4"),
    ],
)
def test_impossible_layouts_are_refused_with_rule_values_and_fix(settings, words):
    with pytest.raises(UserError, match=words):
        plan(**settings)


def test_all_broken_rules_are_told_at_once():
    with pytest.raises(UserError) as caught:
        plan(tp=3, pp=3, world_size=9)
    assert len(str(caught.value).splitlines()) >= 3


@pytest.mark.parametrize(
    ("tp", "words"),
    [
        (5, r"parallel\.tp=5 must divide mamba\.num_heads=24"),
        (3, r"parallel\.tp=3 must divide mamba\.num_groups=4 or be a multiple of it; try parallel\.tp=4"),
        (6, r"parallel\.tp=6 must divide mamba\.norm_groups=4 or be a multiple of it"),
    ],
)
def test_mamba_heads_and_groups_are_cut_whole_or_shared_whole(tp, words):
    with pytest.raises(UserError, match=words):
        make_plan(HYBRID, ParallelConfig(tp=tp), tp, 32, tp, 1)
    for divides in (1, 2, 4, 8, 12):
        make_plan(HYBRID, ParallelConfig(tp=divides), divides, 32, divides, 1)


def test_a_hybrid_model_is_cut_anywhere_but_has_no_virtual_pipeline():
    assert [len(stage) for stage in make_plan(HYBRID, ParallelConfig(pp=5), 5, 32, 5, 1).stage_layers(10)] == [2] * 5
    with pytest.raises(UserError, match="hybrid models have no virtual pipeline"):
        make_plan(HYBRID, ParallelConfig(pp=5, vpp=2), 5, 32, 5, 1)


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({"pp": 2}, [5, 5]),
        ({"pp": 4, "num_layers_in_last_pipeline_stage": 1}, [3, 3, 3, 1]),
        ({"pp": 4, "num_layers_in_first_pipeline_stage": 2, "num_layers_in_last_pipeline_stage": 2}, [2, 3, 3, 2]),
        ({"pp": 2, "num_layers_in_first_pipeline_stage": 7}, [7, 3]),
        ({"pp": 2, "num_layers_in_first_pipeline_stage": 6, "num_layers_in_last_pipeline_stage": 4}, [6, 4]),
    ],
)
def test_every_layer_is_in_one_stage_in_order(settings, sizes):
    stages = make_plan(HYBRID, ParallelConfig(**settings), 4, 32, 8, 1).stage_layers(10)
    assert [len(stage) for stage in stages] == sizes
    assert [layer for stage in stages for layer in stage] == list(range(10))


def test_the_chunks_of_a_virtual_pipeline_are_one_round_of_stages_apart():
    """megatron-core's own example: 8 layers, 2 stages, 2 chunks are [0, 1] [4, 5] and [2, 3] [6, 7]."""
    stages = plan(pp=2, vpp=2, world_size=2).stage_layers(8)
    assert stages == ((0, 1, 4, 5), (2, 3, 6, 7))


def test_the_suggested_last_stage_is_a_plan_that_works():
    with pytest.raises(UserError, match=r"try parallel\.pp=5, or give .*: parallel\.num_layers_in_last_pipeline_stage=1"):
        make_plan(HYBRID, ParallelConfig(pp=4), 4, 32, 4, 1)
    assert make_plan(HYBRID, ParallelConfig(pp=4, num_layers_in_last_pipeline_stage=1), 4, 32, 4, 1).pp == 4
