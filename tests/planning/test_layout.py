"""Every rule of a parallel plan, and that its message names the values and a fix."""

import pytest
from training import TINY_LLAMA

from megatron_prism import families
from megatron_prism.config import ParallelConfig
from megatron_prism.errors import UserError
from megatron_prism.planning.layout import make_plan

MODEL = families.find(TINY_LLAMA).model_config(TINY_LLAMA)


def plan(world_size: int = 8, global_batch: int = 16, micro_batch: int = 1, seq_len: int = 32, **parallel: object):
    return make_plan(MODEL, ParallelConfig(**parallel), world_size, seq_len, global_batch, micro_batch)


def test_data_parallelism_and_micro_batches_follow_from_the_rest():
    found = plan(world_size=8, global_batch=16, micro_batch=2, tp=2, pp=2)
    assert (found.dp, found.num_microbatches, found.world_size, found.padded_vocab_size) == (2, 4, 8, 98)
    assert plan(tp=1).padded_vocab_size == 97


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tp": 3, "world_size": 3}, r"parallel\.tp=3 must divide num_attention_heads=4; try parallel\.tp=4"),
        ({"tp": 4}, r"parallel\.tp=4 must divide num_query_groups=2; try parallel\.tp=2"),
        ({"pp": 3, "world_size": 3}, r"parallel\.pp=3 must divide num_layers=4; try parallel\.pp=4"),
        ({"pp": 4, "vpp": 2}, r"parallel\.pp=4 \* parallel\.vpp=2 must divide num_layers=4"),
        ({"vpp": 2}, "needs a pipeline"),
        ({"sp": True}, "needs tensor parallelism"),
        ({"tp": 2, "sp": True, "seq_len": 33}, r"must divide data\.seq_len=33"),
        ({"cp": 2}, "context parallelism is not implemented yet"),
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
