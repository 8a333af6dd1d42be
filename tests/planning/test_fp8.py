"""Which shapes FP8 products take, and which weights they are: refused by name before anything is built."""

from dataclasses import replace

import pytest
from paper_models import BILLIONS, GRANITE_4_H_MICRO, LLAMA_8B, NEMOTRON_H_8B

from megatron_prism.config import Fp8Config, ParallelConfig
from megatron_prism.errors import UserError
from megatron_prism.planning.fp8 import check_fp8
from megatron_prism.planning.layout import make_plan


def check(model, seq_len: int = 8192, fp8: Fp8Config | None = None, **parallel: object) -> None:
    layout = ParallelConfig(**parallel)
    check_fp8(model, make_plan(model, layout, layout.tp, seq_len, global_batch=1, micro_batch=1), seq_len, fp8 or Fp8Config())


@pytest.mark.parametrize("name", BILLIONS)
def test_every_published_model_multiplies_in_fp8_on_one_rank(name):
    check(BILLIONS[name][0])


def test_a_cut_that_leaves_odd_sizes_is_refused_with_each_of_them_and_one_that_does_not_passes():
    """Granite-4-H's 64 heads give 8 rows of in_proj to each of 8 ranks, beside 1,024 of z and x: its one group of B and C is whole on every rank."""
    check(GRANITE_4_H_MICRO, tp=4)
    with pytest.raises(UserError) as caught:
        check(GRANITE_4_H_MICRO, tp=8)
    assert str(caught.value).splitlines() == [
        "fp8 needs sizes that are multiples of 16; with tp=8 these are not:",
        "  Mamba in_proj rows of this rank = 1032",
        "lower tp, or set fp8=none",
    ]
    check(NEMOTRON_H_8B, tp=8)


def test_b_and_c_that_every_rank_makes_are_a_size_of_their_own():
    narrow = replace(GRANITE_4_H_MICRO, mamba=replace(GRANITE_4_H_MICRO.mamba, state_dim=20))
    with pytest.raises(UserError, match=r"Mamba B and C rows of this rank = 40"):
        check(narrow, tp=4)


@pytest.mark.parametrize(
    ("seq_len", "parallel", "words"),
    [
        (8191, {}, r"tokens of a micro-batch on a rank \(seq_len \* micro_batch / cp\) = 8191"),
        (8200, {}, "= 8200"),
        (8192 + 32, {"tp": 4, "sp": True}, "tokens of a micro-batch on a sequence-parallel rank = 2056"),
    ],
)
def test_tokens_are_an_inner_size_too(seq_len, parallel, words):
    with pytest.raises(UserError, match=words):
        check(LLAMA_8B, seq_len, **parallel)
    check(LLAMA_8B, 8192 + 64, **parallel)


@pytest.mark.parametrize(("start", "end"), [(32, 0), (16, 16), (0, 40)])
def test_layers_kept_in_bf16_must_leave_some(start, end):
    check(LLAMA_8B, fp8=Fp8Config(bf16_layers_at_start=start // 2, bf16_layers_at_end=end // 2))
    with pytest.raises(UserError, match=rf"= {start + end} leave none of 32 layers in FP8"):
        check(LLAMA_8B, fp8=Fp8Config(bf16_layers_at_start=start, bf16_layers_at_end=end))
