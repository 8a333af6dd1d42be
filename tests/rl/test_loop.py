"""The RL loop on a real, tiny model: reward rises from random weights, a resumed run is the unbroken one, what goes wrong leaves nothing behind."""

import json
import math
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rl_runs
import torch
from training import differing, final_state

from megatron_prism import artifact
from megatron_prism.config import load_recipe
from megatron_prism.engine import calendar, checkpoint, parallel, run_folder
from megatron_prism.engine.recipe_blocks import EvaluationSection
from megatron_prism.engine.sharded import Reader
from megatron_prism.engine.step import DivergenceError
from megatron_prism.engine.weight_sync import weight_stream
from megatron_prism.errors import UserError
from megatron_prism.generate.digests import differing as differing_weights
from megatron_prism.generate.transformers_backend import TransformersGenerator
from megatron_prism.grading import Verdict, pool
from megatron_prism.rl import loop
from megatron_prism.rl.alarms import CollapseError
from megatron_prism.rl.recipe import RLConfig
from megatron_prism.rl.rewards import GraderAlarmError

SAVING = {"checkpoint__save_interval": 2, "checkpoint__keep_last": None}
LEARNING = {"steps": 24, "optimizer__lr": 3e-2, "schedule__kind": "constant", "rollout__responses_per_prompt": 8}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rl_runs.make_inputs(tmp_path_factory.mktemp("rl"))


@pytest.fixture(autouse=True, scope="module")
def leave_groups():
    yield
    parallel.stop()


@pytest.fixture(scope="module")
def unbroken(root: Path) -> Path:
    """A run of four steps that was never stopped: its checkpoints of steps 2 and 4, its reference moved at both."""
    return loop.reinforce(rl_runs.config(root, root / "unbroken", **SAVING))


def halfway_copy(run: Path, to: Path) -> Path:
    """A run as it lies on disk when it is killed after its first checkpoint and before its second."""
    shutil.copytree(run, to)
    (to / artifact.COMPLETE).unlink()
    checkpoint.remove(run_folder.step_folder(to, 4))
    return to


def test_reward_rises_from_random_weights(root, tmp_path):
    lines = rl_runs.lines(loop.reinforce(rl_runs.config(root, tmp_path / "run", **LEARNING)))
    first, last = (sum(line["reward"] for line in part) / 6 for part in (lines[:6], lines[-6:]))
    assert first < 0.6 < 0.9 < last, [round(line["reward"], 2) for line in lines]


def test_a_finished_run_has_all_that_a_training_run_has_and_its_samples(root, unbroken):
    artifact.require(unbroken, "rl")
    assert [folder.name for folder in run_folder.complete_steps(unbroken)] == ["step_00000002", "step_00000004"]
    assert load_recipe(unbroken / "config.toml", [], RLConfig) == rl_runs.config(root, unbroken, **SAVING)
    assert (unbroken / "report.html").is_file() and not (unbroken / "generator").exists()
    assert [line["step"] for line in rl_runs.lines(unbroken)] == [1, 2, 3, 4]
    for step in (1, 4):
        kept = rl_runs.samples(unbroken, step)
        assert len(kept) == 16 and {one["weights_version"] for one in kept} == {step - 1}, "a sample knows its weights"


def test_metrics_tell_rewards_by_domain_training_and_where_the_time_went(unbroken):
    for line in rl_runs.lines(unbroken):
        assert {"reward/even", "pass_rate/odd", "solved", "solved_from_zero", "groups_all_equal", "gradings_failed", "truncated"} <= line.keys()
        assert {"seconds/generation", "seconds/reference", "seconds/training", "seconds/sync", "seconds/grading"} <= line.keys()
        assert 0 < line["generation_share"] < 1 and line["trained_tokens_per_second"] > 0
        assert line["mismatch"] < 1e-5 and line["ratio"] == 1.0 and line["clipped_low"] == line["clipped_high"] == 0.0, "strictly on-policy: inert"


def test_the_reference_is_the_policy_until_the_first_step(unbroken):
    lines = rl_runs.lines(unbroken)
    assert abs(lines[0]["kl"]) < 1e-9 < lines[1]["kl"]


def test_a_resumed_run_equals_the_unbroken_run_bit_for_bit(root, unbroken, tmp_path):
    run = halfway_copy(unbroken, tmp_path / "run")
    loop.reinforce(rl_runs.config(root, run, **SAVING))
    assert rl_runs.numbers(run) == rl_runs.numbers(unbroken)
    assert rl_runs.samples(run, 4) == rl_runs.samples(unbroken, 4)
    assert differing(final_state(run), final_state(unbroken)) == []
    last = [json.loads((run_folder.step_folder(folder, 4) / "state.json").read_text())["progress"] for folder in (run, unbroken)]
    assert last[0] == last[1], "what the alarms and solved_from_zero remember"


def test_a_reference_that_is_not_resumed_breaks_the_equality(root, unbroken, tmp_path, monkeypatch):
    """The reference moved at step 2: without its own checkpoint it would be the policy of that step."""
    monkeypatch.setattr(loop.Reference, "load", lambda *_: None)
    run = halfway_copy(unbroken, tmp_path / "run")
    loop.reinforce(rl_runs.config(root, run, **SAVING))
    assert rl_runs.numbers(run) != rl_runs.numbers(unbroken)


def test_the_generator_has_the_trainers_weights_bit_for_bit_after_a_sync(root, tmp_path):
    with ExitStack() as closing:
        run = loop.build_run(rl_runs.config(root, tmp_path / "run"), closing)
        loop._step(run)
        assert isinstance(run.generator, TransformersGenerator)
        run.generator.wake()
        held = run.generator.model.state_dict()
        assert differing_weights(weight_stream(run.engine, run.model_config), held) != [], "the step changed the trainer's alone"
        loop.sync(run)
        assert differing_weights(weight_stream(run.engine, run.model_config), held) == []
        assert run.generator.weights_version == 1


def test_an_export_that_failed_at_the_last_step_is_made_at_the_next_start(root, tmp_path, monkeypatch):
    settings = {"steps": 2, "export__interval": 2, "checkpoint__save_interval": 2}

    def break_off(checkpoint: Path, output: Path, dtype: str) -> None:
        output.mkdir()
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(calendar, "export_hf", break_off)
        with pytest.raises(OSError, match="no space left"):
            loop.reinforce(rl_runs.config(root, tmp_path / "run", **settings))
    run = loop.reinforce(rl_runs.config(root, tmp_path / "run", **settings))
    assert (run / "hf" / "config.json").is_file() and artifact.is_complete(run)
    assert len(rl_runs.lines(run)) == 2, "no step was taken again"


def test_an_evaluation_that_a_time_limit_kept_from_the_last_step_is_owed(root, tmp_path):
    asked: list[str] = []

    def evaluate(checkpoint: Path) -> dict[str, float]:
        asked.append(checkpoint.name)
        return {"evaluation/score": 0.5}

    cfg = rl_runs.config(root, tmp_path / "run", steps=1, checkpoint__save_interval=1).model_copy(
        update={"evaluation": EvaluationSection(interval=1, tasks=["x"])}
    )
    run = loop.reinforce(cfg.model_copy(update={"time_limit_minutes": 1e-6}), evaluate)
    assert not artifact.is_complete(run) and asked == []
    loop.reinforce(cfg, evaluate)
    assert artifact.is_complete(run) and asked == ["step_00000001"]
    loop.reinforce(cfg, evaluate)
    assert asked == ["step_00000001"], "once"


def test_other_prompts_are_refused_at_resume(root, unbroken, tmp_path):
    run = halfway_copy(unbroken, tmp_path / "run")
    with pytest.raises(UserError, match="the prompts, or their order, are others"):
        loop.reinforce(rl_runs.config(root, run, prompts__seed=99, **SAVING))


def test_a_time_limit_saves_and_stops_and_the_same_command_goes_on(root, unbroken, tmp_path):
    stopped = loop.reinforce(rl_runs.config(root, tmp_path / "run", time_limit_minutes=1e-6, **SAVING))
    assert not artifact.is_complete(stopped) and run_folder.newest(stopped) == run_folder.step_folder(stopped, 1)
    loop.reinforce(rl_runs.config(root, stopped, **SAVING))
    assert artifact.is_complete(stopped) and rl_runs.numbers(stopped) == rl_runs.numbers(unbroken)


def test_more_updates_than_one_leave_the_policy_and_the_clip_acts(root, tmp_path):
    more = {"objective__updates_per_batch": 3, "optimizer__lr": 3e-2}
    line = rl_runs.lines(loop.reinforce(rl_runs.config(root, tmp_path / "run", steps=1, **more)))[0]
    assert line["ratio"] != 1.0 and line["clipped_low"] + line["clipped_high"] > 0


# --- what goes wrong ---------------------------------------------------------------------------------------------------------------------------


def ends_with(root: Path, run: Path, error: type[Exception], said: str, **settings: Any) -> None:
    """The run ends so, in its third step; its checkpoint of step 2 is whole and is named, and once mended it ends as the unbroken run."""
    with pytest.raises(error, match=said) as raised:
        loop.reinforce(rl_runs.config(root, run, **{**SAVING, **settings}))
    assert str(raised.value).startswith("step 3: ") and str(run_folder.step_folder(run, 2)) in str(raised.value)
    assert [folder.name for folder in run_folder.complete_steps(run)] == ["step_00000002"]


def from_the_third_step(monkeypatch: pytest.MonkeyPatch, name: str, fault: Any) -> None:
    """`loop.NAME` calls fault(right, *arguments) when it is called for the third time, and is right before."""
    right, calls = getattr(loop, name), []

    def faulty(*arguments: Any, **settings: Any) -> Any:
        calls.append(1)
        return fault(right, *arguments, **settings) if len(calls) >= 3 else right(*arguments, **settings)

    monkeypatch.setattr(loop, name, faulty)


def test_a_generator_that_dies_in_a_step_loses_nothing(root, unbroken, tmp_path, monkeypatch):
    def die(*_: Any, **__: Any) -> Any:
        raise UserError("the vllm server ended with -9")

    with monkeypatch.context() as patched:
        from_the_third_step(patched, "_drawn", die)
        ends_with(root, tmp_path / "run", UserError, "the vllm server ended with -9")
    loop.reinforce(rl_runs.config(root, tmp_path / "run", **SAVING))
    assert rl_runs.numbers(tmp_path / "run") == rl_runs.numbers(unbroken)
    assert differing(final_state(tmp_path / "run"), final_state(unbroken)) == []


def failed(number: int, graded: list[Any]) -> list[Any]:
    """The first so many verdicts as a grader's that hung and was ended."""
    return [Verdict(False, 0.0, "timeout", "", "the grader said nothing in time") if place < number else one for place, one in enumerate(graded)]


class FailingPool:
    """A pool that says of some answers what one says of those whose grader hung."""

    def __init__(self, pool: Any, number: int) -> None:
        self.pool, self.number = pool, number

    def verdicts(self, pairs: Any) -> list[Any]:
        return failed(self.number, list(self.pool.verdicts(pairs)))


ENDLESS = {"grader": "math", "extraction": "whole", "entry": {"answer": "9^{9^{9^9}}"}}


def test_a_grader_that_hangs_costs_that_answer_alone(root, tmp_path, monkeypatch):
    """The solution of one prompt is a number that no grader can compute: comparing an answer with it is ended by its own limit, here a second."""
    monkeypatch.setattr(pool, "CPU_SECONDS", 1.0)
    lines = [json.loads(line) for line in (root / "prompts.jsonl").read_text().splitlines()[:4]]
    rl_runs.write_prompts(tmp_path, [{**lines[0], **ENDLESS}, *lines[1:]])

    def answered(right: Any, run: loop.Run) -> Any:
        written = right(run)
        return replace(
            written, responses=[replace(one, text="7") if (one.prompt.id, one.sample) == ("word/0", 2) else one for one in written.responses]
        )

    monkeypatch.setattr(loop, "_drawn", lambda run, right=loop._drawn: answered(right, run))
    settings = {"steps": 1, "prompts__sources": [{"file": str(tmp_path / "prompts.jsonl")}]}
    line = rl_runs.lines(loop.reinforce(rl_runs.config(root, tmp_path / "run", **settings)))[0]
    assert (line["gradings"], line["gradings_failed"], line["updated"]) == (16.0, 1.0, 1.0)
    assert [(one["id"], one["sample"]) for one in rl_runs.samples(tmp_path / "run", 1) if one["why"] == "grading failed"] == [("word/0", 2)]


def test_an_empty_group_is_left_out_and_the_run_goes_on(root, tmp_path, monkeypatch):
    def silent(right: Any, run: loop.Run) -> Any:
        written = right(run)
        return replace(
            written, responses=[replace(one, tokens=(), written=(), logprobs=(), text="") for one in written.responses[:4]] + written.responses[4:]
        )

    trained: list[int] = []
    monkeypatch.setattr(loop, "_drawn", lambda run, right=loop._drawn: silent(right, run))
    monkeypatch.setattr(loop, "_update", lambda run, batch, right=loop._update: (trained.append(len(batch.sequences)), right(run, batch))[1])
    run = loop.reinforce(rl_runs.config(root, tmp_path / "run", steps=2))
    assert trained == [12, 12] and [line["updated"] for line in rl_runs.lines(run)] == [1.0, 1.0]


def test_an_error_of_another_kind_stays_what_it_is_and_says_where_to_go_on(root, tmp_path, monkeypatch):
    def fail(*_: Any) -> Any:
        raise MemoryError("the device has no memory left")

    from_the_third_step(monkeypatch, "_update", fail)
    with pytest.raises(MemoryError) as raised:
        loop.reinforce(rl_runs.config(root, tmp_path / "run", **SAVING))
    assert str(raised.value) == "the device has no memory left"
    [note] = raised.value.__notes__
    assert note.startswith("in step 3. ") and str(run_folder.step_folder(tmp_path / "run", 2)) in note


def test_a_batch_that_graders_fail_on_is_an_alarm_and_not_data(root, tmp_path, monkeypatch):
    from_the_third_step(monkeypatch, "rewards", lambda right, *args: right(args[0], args[1], FailingPool(args[2], 16), args[3]))
    ends_with(root, tmp_path / "run", GraderAlarmError, "graders failed on 16 of the 16 answers")


def test_a_reward_that_is_no_number_ends_the_run_and_is_named(root, tmp_path, monkeypatch):
    def spoil(right: Any, *arguments: Any) -> Any:
        first, *rest = right(*arguments)
        return [type(first)(math.nan, first.verdict, True), *rest]

    from_the_third_step(monkeypatch, "rewards", spoil)
    ends_with(root, tmp_path / "run", UserError, r"a reward must be a finite number; that of prompt 0 \(word/")


def test_a_step_of_nan_leaves_the_checkpoint_good(root, tmp_path, monkeypatch):
    def spoil(right: Any, *arguments: Any) -> Any:
        loss_t, sums = right(*arguments)
        return loss_t * math.nan, sums

    calls: list[int] = []
    right = loop.policy_loss

    def faulty(*arguments: Any) -> Any:
        calls.append(1)
        return spoil(right, *arguments) if (tmp_path / "run" / "checkpoints" / "step_00000002" / "COMPLETE").exists() else right(*arguments)

    monkeypatch.setattr(loop, "policy_loss", faulty)
    ends_with(root, tmp_path / "run", DivergenceError, "gradient norm nan")


def test_a_mismatch_beyond_its_limit_stops_before_the_step_is_saved(root, tmp_path):
    with pytest.raises(CollapseError, match=r"step 1: alarms.mismatch=1e-12.*no checkpoint was saved yet"):
        loop.reinforce(rl_runs.config(root, tmp_path / "run", alarms__mismatch=1e-12))
    assert len(rl_runs.lines(tmp_path / "run")) == 1, "what rang is in the metrics"


def test_a_collapse_is_seen_and_the_checkpoint_from_before_it_is_named(root, tmp_path, monkeypatch):
    settings = {"steps": 12, "alarms__window": 2, **SAVING}
    monkeypatch.setattr(loop.metrics, "figures", lambda *args, right=loop.metrics.figures: {**right(*args), "entropy": next(ENTROPIES)})
    with pytest.raises(CollapseError, match=r"step 6: alarms.entropy_above=3.*last good checkpoint is .*step_00000004, from before"):
        loop.reinforce(rl_runs.config(root, tmp_path / "run", **settings))


ENTROPIES = iter([5.0, 5.0, 5.0, 5.0, 20.0, 20.0])


def test_equal_rewards_are_counted_and_teach_nothing_but_to_stay_near_the_reference(root, tmp_path, monkeypatch):
    """As the paper has it such groups stay in the mean: at the first step, where the policy is the reference, their gradient is nothing at all."""
    monkeypatch.setattr(loop, "rewards", lambda *args, right=loop.rewards: [type(one)(0.5, one.verdict, True) for one in right(*args)])
    [line] = rl_runs.lines(loop.reinforce(rl_runs.config(root, tmp_path / "run", steps=1)))
    assert (line["groups_all_equal"], line["updated"]) == (4.0, 1.0)
    assert line["grad_norm"] < 1e-6 and abs(line["loss"]) < 1e-9


def test_with_dynamic_sampling_equal_rewards_are_left_out(root, tmp_path, monkeypatch):
    """With dynamic sampling nothing of such a batch is left: the weights stay, the run goes on."""
    monkeypatch.setattr(loop, "rewards", lambda *args, right=loop.rewards: [type(one)(0.5, one.verdict, True) for one in right(*args)])
    run = loop.reinforce(rl_runs.config(root, tmp_path / "run", steps=2, objective__dynamic_sampling=True))
    assert [(line["groups_all_equal"], line["updated"]) for line in rl_runs.lines(run)] == [(4.0, 0.0)] * 2
    start, end = (Reader(folder / "sharded") for folder in (root / "start", run_folder.step_folder(run, 2)))
    for name in sorted(start.keys()):
        weight = start.read(name)
        assert torch.equal(end.read(name)[: len(weight)], weight), f"{name} stays; the vocabulary is padded"


def test_prompts_that_are_too_long_are_dropped_and_counted_before_the_run(root, tmp_path, capsys):
    lines = (root / "prompts.jsonl").read_text().splitlines()
    long = {**json.loads(lines[0]), "id": "long", "question": "the cat sat " * 40}
    (tmp_path / "prompts.jsonl").write_text("\n".join([*lines, json.dumps(long)]) + "\n")
    settings = {"steps": 1, "prompts__sources": [{"file": str(tmp_path / "prompts.jsonl")}]}
    loop.reinforce(rl_runs.config(root, tmp_path / "run", **settings))
    assert "12 prompts: 6 even, 6 odd; 1 were too long and dropped" in capsys.readouterr().err
    with pytest.raises(UserError, match="prompts are too long"):
        loop.reinforce(rl_runs.config(root, tmp_path / "other", prompts__on_too_long="refuse", **settings))
