"""What context parallelism asks of lengths, heads and groups; and which exchange TransformerEngine's attention is given."""

from dataclasses import replace

import pytest
from paper_models import GRANITE_4_H_MICRO, LLAMA_8B, MISTRAL_7B, NEMOTRON_H_8B
from training import from_random, recipe

from megatron_prism.config import ParallelConfig, load_recipe
from megatron_prism.engine.recipe import TrainConfig, check_model
from megatron_prism.errors import UserError
from megatron_prism.planning.context_parallel import check_packing
from megatron_prism.planning.layout import ParallelPlan, make_plan

FEW_GROUPS = replace(NEMOTRON_H_8B, mamba=replace(NEMOTRON_H_8B.mamba, num_heads=96, num_groups=6, norm_groups=6))


def plan(model=LLAMA_8B, seq_len: int = 8192, **parallel: object) -> ParallelPlan:
    wanted = ParallelConfig(**parallel)
    return make_plan(model, wanted, wanted.model_ranks, seq_len, 8, 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cp": 3}, r"parallel\.cp=3 must cut data\.seq_len=8192 into 2\*cp equal chunks; try parallel\.cp=4 or data\.seq_len=8190"),
        ({"cp": 2, "seq_len": 8191}, r"parallel\.cp=2 must cut data\.seq_len=8191 into .*; try data\.seq_len=8188"),
        ({"cp": 2, "tp": 8, "sp": True, "seq_len": 8196}, r"parallel\.tp=8 \* parallel\.cp=2 must divide data\.seq_len=8196"),
        ({"cp_comm_type": "a2a"}, r"parallel\.cp_comm_type=a2a needs context parallelism: parallel\.cp must be at least 2; drop it"),
        ({"hierarchical_context_parallel_sizes": (2, 2)}, "hierarchical_context_parallel_sizes=.* needs context parallelism"),
        ({"cp": 2, "hierarchical_context_parallel_sizes": (2, 1)}, "goes with parallel.cp_comm_type=a2a.p2p, not None; drop it"),
        ({"cp": 4, "cp_comm_type": "a2a+p2p"}, r"a2a\+p2p needs .* product is parallel\.cp=4, not none; try \[2, 2\]"),
        (
            {"cp": 8, "cp_comm_type": "a2a+p2p", "hierarchical_context_parallel_sizes": (2, 2)},
            r"product is parallel\.cp=8, not \[2, 2\]; try \[2, 4\]",
        ),
        ({"tp": 8, "cp": 2, "cp_comm_type": "a2a"}, r"tp=8 times its 2 ranks must divide num_query_groups=8; try parallel\.cp_comm_type=p2p"),
        (
            {"tp": 4, "cp": 8, "cp_comm_type": "a2a+p2p", "hierarchical_context_parallel_sizes": (4, 2)},
            r"tp=4 times its 4 ranks must divide num_query_groups=8",
        ),
        ({"model": MISTRAL_7B, "cp": 2, "cp_comm_type": "p2p"}, "p2p with a sliding window of 4096: .*a2a and all_gather alone; use one of these"),
        ({"model": GRANITE_4_H_MICRO, "seq_len": 2**17, "cp": 128}, r"cp=128 must divide mamba\.num_heads=64; try parallel\.cp=64"),
        ({"model": FEW_GROUPS, "cp": 4}, r"cp=4 must divide mamba\.num_groups=6, or parallel\.cp be a multiple of the 6 .*; try parallel\.cp=3"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_rule_values_and_fix(settings, words):
    with pytest.raises(UserError, match=words):
        plan(**settings)


def test_mamba_groups_are_cut_over_tp_and_cp_or_shared_whole():
    for tp, cp in ((1, 2), (1, 16), (2, 4), (2, 8), (8, 2), (16, 4), (8, 16)):
        plan(replace(NEMOTRON_H_8B, num_attention_heads=128, num_query_groups=128), tp=tp, cp=cp)
    for tp, cp in ((1, 64), (2, 32), (8, 8)):
        plan(GRANITE_4_H_MICRO, tp=tp, cp=cp)


def test_the_exchange_is_a_ring_unless_the_model_or_the_recipe_says_otherwise():
    assert plan().cp_comm_type is None
    assert plan(cp=2).cp_comm_type == "p2p"
    assert plan(cp=2, cp_comm_type="all_gather").cp_comm_type == "all_gather"
    assert plan(MISTRAL_7B, cp=2).cp_comm_type == "a2a"
    assert plan(MISTRAL_7B, cp=2, tp=8).cp_comm_type == "all_gather"
    assert plan(cp=4, cp_comm_type="a2a+p2p", hierarchical_context_parallel_sizes=(2, 2)).hierarchical_context_parallel_sizes == (2, 2)


@pytest.mark.parametrize("kind", ["all_gather", "a2a+p2p"])
def test_packed_documents_go_with_two_exchanges_alone(kind):
    for allowed in (None, "p2p", "a2a"):
        check_packing(allowed)
    with pytest.raises(UserError, match="takes packed documents with p2p and a2a alone; use one of these, or layers=local"):
        check_packing(kind)


def check(tmp_path, model=LLAMA_8B, **settings: object) -> None:
    cfg = load_recipe(None, recipe(tmp_path, tmp_path / "run", **from_random(tmp_path), **settings), TrainConfig)
    check_model(cfg, model, make_plan(model, cfg.parallel, cfg.parallel.model_ranks, cfg.data.seq_len, 8, 1))


def test_an_exchange_is_for_transformer_engine(tmp_path):
    asked = {"parallel__cp": 2, "parallel__cp_comm_type": "a2a"}
    for ours in ({"device": "cpu"}, {"device": "cuda", "layers": "local"}):
        with pytest.raises(UserError, match=r"cp_comm_type=a2a is for TransformerEngine's layers; ours .* gather: drop it"):
            check(tmp_path, **asked, **ours)
    check(tmp_path, **asked, device="cuda")


def test_a_recipe_packs_with_an_exchange_that_takes_packed_documents(tmp_path):
    packed = {"data__packing__pad_multiple": 4, "parallel__cp": 2}
    with pytest.raises(UserError, match=r"parallel\.cp_comm_type=all_gather with data\.packing"):
        check(tmp_path, **packed, device="cuda", parallel__cp_comm_type="all_gather")
    with pytest.raises(UserError, match=r"parallel\.cp_comm_type=all_gather with data\.packing"):
        check(tmp_path, MISTRAL_7B, **packed, device="cuda", parallel__tp=8)  # a2a cannot cut its 8 KV heads, all_gather cannot pack
    check(tmp_path, MISTRAL_7B, **packed, device="cuda", parallel__tp=4)
    check(tmp_path, MISTRAL_7B, **packed, device="cuda", parallel__tp=8, layers="local")
