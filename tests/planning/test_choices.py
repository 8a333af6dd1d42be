"""Which layouts are offered, in which order, and which is taken."""

from paper_models import GRANITE_4_H_MICRO, LLAMA_8B, MISTRAL_24B, NEMOTRON_H_8B

from megatron_prism.config import Fp8Config, OptimizerConfig, ParallelConfig
from megatron_prism.errors import UserError
from megatron_prism.planning.choices import Task, choices, offloaded, recommended, survey, verdict
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
    assert taken(LLAMA_8B, 8, 80, 32768) == "parallel.tp=2 parallel.sp=true parallel.pp=1 parallel.cp=2 recompute=none"
    assert taken(GRANITE_4_H_MICRO, 8, 80, 32768).endswith(
        "parallel.tp=1 parallel.sp=false parallel.pp=1 parallel.cp=1 recompute=full keep_attention=true"
    )
    assert taken(LLAMA_8B, 8, 141, 131072) == "parallel.tp=2 parallel.sp=true parallel.pp=1 parallel.cp=4 recompute=none"
    assert {choice.plan.cp for choice in choices(LLAMA_8B, 8, 8192)} == {1}
    assert {choice.plan.cp for choice in choices(LLAMA_8B, 64, 65536)} == {1, 2, 4}
    assert all(choice.plan.world_size == 64 for choice in choices(LLAMA_8B, 64, 65536))


def test_where_long_sequences_run_again_attention_does_not_unless_its_output_has_no_room():
    assert taken(LLAMA_8B, 2, 141, 131072) == "parallel.tp=2 parallel.sp=true parallel.pp=1 parallel.cp=1 recompute=full keep_attention=true"
    found = [choice for choice in choices(LLAMA_8B, 2, 131072) if choice.plan.cp == 2 and choice.recompute]
    assert [choice.keep_attention for choice in found] == [True, False]
    assert found[0].need.activations > found[1].need.activations
    assert not any(choice.keep_attention for choice in choices(LLAMA_8B, 8, 16384))


def test_what_is_taken_fits_and_everything_quicker_does_not_or_is_a_pipeline():
    found = choices(MISTRAL_24B, 8, 8192)
    best = recommended(found, 80)
    assert best is not None
    assert best.need.fits(80)
    quicker = found[: found.index(best)]
    assert quicker
    assert not any(choice.need.fits(80) for choice in quicker if choice.plan.pp == 1)
    assert any(choice.need.fits(80) for choice in quicker)  # none was ever measured


def test_a_pipeline_is_taken_where_nothing_else_fits():
    found = choices(MISTRAL_24B, 64, 8192)
    best = recommended(found, 15)
    assert best is not None and best.plan.pp > 1
    assert not any(choice.need.fits(15) for choice in found if choice.plan.pp == 1)


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


def test_the_survey_holds_every_layout_with_its_rule_or_its_figures():
    """52 layers and a batch of 48 on 64 GPUs: whatever `make_plan` refuses is kept in its words, and nothing is lost."""
    found = survey(Task(NEMOTRON_H_8B, 64, 8192, global_batch=48))
    tried = {(p.tp, p.pp) for p in (*(choice.plan for choice in found.allowed), *(refusal.parallel for refusal in found.refused))}
    assert tried == {(tp, pp) for tp in (1, 2, 4, 8) for pp in (1, 2, 4, 8, 16, 32, 64) if 64 % (tp * pp) == 0 and pp <= 52}
    assert {refusal.rule.split(";")[0] for refusal in found.refused if refusal.parallel.pp == 1} == {
        "global_batch=48 must be a multiple of dp=64 * micro_batch=1", "global_batch=48 must be a multiple of dp=32 * micro_batch=1"
    }  # fmt: skip
    assert all("must divide num_layers=52" in refusal.rule or "global_batch" in refusal.rule for refusal in found.refused)
    assert all(choice.global_batch == 48 for choice in found.allowed)


def test_what_else_forbids_a_layout_is_asked_of_the_recipe():
    def no_tp(plan, parallel: ParallelConfig, training: Training) -> None:
        if parallel.tp > 1:
            raise UserError(f"parallel.tp={parallel.tp}: not here")

    found = survey(Task(LLAMA_8B, 8, 8192, check=no_tp))
    assert {choice.plan.tp for choice in found.allowed} == {1}
    assert {refusal.rule for refusal in found.refused if refusal.parallel.tp == 2} == {"parallel.tp=2: not here"}


def test_what_layers_keep_waits_in_host_memory_only_when_asked_for_and_makes_room():
    """LLaMA-3.1-8B at 131,072 tokens on one H200 was run so (docs/benchmarks.md)."""
    compact = Training(optimizer=OptimizerConfig(gradients="bf16", moments="bf16", split_master=True))
    task = Task(LLAMA_8B, 1, 131_072, training=compact)
    found = survey(task)
    assert recommended(found.allowed, 120) is None
    best = recommended(offloaded(task, found), 120)
    assert best is not None and best.overrides.endswith("recompute=full keep_attention=true offload_activations=true")
    assert "waits in host memory" in best.reason


def test_a_virtual_pipeline_is_offered_to_dense_models_alone():
    assert {choice.plan.vpp for choice in choices(LLAMA_8B, 8, 8192) if choice.plan.pp == 2} == {None, 2, 4}
    assert {choice.plan.vpp for choice in choices(NEMOTRON_H_8B, 8, 8192)} == {None}
