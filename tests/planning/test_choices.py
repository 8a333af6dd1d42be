"""Which layouts are offered, in which order, and which is taken."""

from paper_models import GRANITE_4_H_MICRO, LLAMA_8B, MISTRAL_24B, NEMOTRON_H_8B

from megatron_prism.config import Fp8Config, OptimizerConfig
from megatron_prism.planning.choices import choices, recommended, verdict
from megatron_prism.planning.training import Training


def taken(model, gpus: int, memory_gib: float, seq_len: int = 8192) -> str | None:
    best = recommended(choices(model, gpus, seq_len), memory_gib)
    return best and best.overrides


def test_data_parallelism_comes_first_then_a_little_tp_then_recomputation_then_more_tp():
    assert taken(LLAMA_8B, 8, 141) == "parallel.tp=1 parallel.sp=false parallel.pp=1 parallel.cp=1 recompute=none"
    assert taken(LLAMA_8B, 8, 80) == "parallel.tp=2 parallel.sp=true parallel.pp=1 parallel.cp=1 recompute=none"
    assert taken(LLAMA_8B, 1, 141) is None
    assert taken(GRANITE_4_H_MICRO, 1, 80) == "parallel.tp=1 parallel.sp=false parallel.pp=1 parallel.cp=1 recompute=full"


def test_long_sequences_are_cut_before_matrices_and_short_ones_not_at_all():
    assert taken(GRANITE_4_H_MICRO, 8, 80, 32768) == "parallel.tp=2 parallel.sp=true parallel.pp=1 parallel.cp=2 recompute=none"
    assert taken(LLAMA_8B, 8, 141, 131072) == "parallel.tp=1 parallel.sp=false parallel.pp=1 parallel.cp=2 recompute=full keep_attention=true"
    assert {choice.plan.cp for choice in choices(LLAMA_8B, 8, 8192)} == {1}
    assert {choice.plan.cp for choice in choices(LLAMA_8B, 64, 65536)} == {1, 2, 4}
    assert all(choice.plan.world_size == 64 for choice in choices(LLAMA_8B, 64, 65536))


def test_where_long_sequences_run_again_attention_does_not_unless_its_output_has_no_room():
    assert taken(LLAMA_8B, 2, 141, 131072) == "parallel.tp=2 parallel.sp=true parallel.pp=1 parallel.cp=1 recompute=full keep_attention=true"
    found = [choice for choice in choices(LLAMA_8B, 2, 131072) if choice.plan.cp == 2 and choice.recompute]
    assert [choice.keep_attention for choice in found] == [True, False]
    assert found[0].need.activations > found[1].need.activations
    assert not any(choice.keep_attention for choice in choices(LLAMA_8B, 8, 16384))


def test_what_is_taken_fits_and_everything_quicker_does_not():
    found = choices(MISTRAL_24B, 8, 8192)
    best = recommended(found, 80)
    assert best is not None
    assert best.need.fits(80)
    quicker = found[: found.index(best)]
    assert quicker
    assert not any(choice.need.fits(80) for choice in quicker)


def test_smaller_states_and_fp8_weights_make_room_for_quicker_layouts():
    """On two GPUs of 141 GB the states of 8 B parameters leave no room for 32 layers' activations, unless the states are small."""
    compact = OptimizerConfig(gradients="bf16", moments="bf16", split_master=True)
    found = {name: recommended(choices(LLAMA_8B, 2, 8192, training=training), 141) for name, training in {
        "default": Training(),
        "compact": Training(optimizer=compact),
        "fp8": Training(optimizer=compact, fp8=Fp8Config(), recompute="full", recompute_layers=3),
    }.items()}  # fmt: skip
    assert (found["default"].plan.tp, found["default"].recompute) == (2, None)
    assert (found["compact"].plan.tp, found["compact"].recompute) == (1, None)
    assert (found["fp8"].plan.tp, found["fp8"].recompute) == (1, None)  # what it recomputed before is not asked
    assert found["fp8"].need.weights > found["compact"].need.weights


def test_nothing_is_taken_when_nothing_fits():
    assert taken(MISTRAL_24B, 1, 80) is None


def test_tensor_parallelism_stays_in_a_node_and_always_cuts_the_sequence_too():
    plans = [choice.plan for choice in choices(LLAMA_8B, 64, 8192)]
    assert max(plan.tp for plan in plans) == 8
    assert all(plan.sp == (plan.tp > 1) for plan in plans)
    assert all(plan.world_size == 64 for plan in plans)


def test_a_layout_that_the_model_does_not_allow_is_not_offered():
    """One hybrid has 52 layers: 8 stages would not be of equal length."""
    assert {choice.plan.pp for choice in choices(NEMOTRON_H_8B, 8, 8192)} == {1, 2, 4}
    assert {(choice.plan.tp, choice.plan.pp) for choice in choices(LLAMA_8B, 7, 8192)} == {(1, 1)}


def test_the_verdict_says_the_figures_and_the_rule():
    need = choices(LLAMA_8B, 8, 8192)[0].need
    assert verdict(need, 141) == "fits: 93.6 GiB of 141 GiB, of which 126.9 may be planned"
    assert verdict(need, 80) == "does not fit: 93.6 GiB of 80 GiB, of which 72.0 may be planned"
