"""When a loss has jumped, how many steps may be left out, and which records of rollbacks count: rules without a model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training import from_random, recipe

from megatron_prism.config import load_recipe
from megatron_prism.engine import bad_steps
from megatron_prism.engine.bad_steps import BadStepsSection, Memory, SpikeSection, limit
from megatron_prism.engine.recipe import TrainConfig
from megatron_prism.errors import UserError


def judged(values: list[float], **settings: Any) -> tuple[Memory, list[int]]:
    """The memory after these steps, and the steps (from 1) that made a spike."""
    section, memory, spikes = SpikeSection(**settings), Memory(), []
    for step, value in enumerate(values, 1):
        if memory.see(value, step, 8 * (step - 1), section):
            spikes.append(step)
    return memory, spikes


def test_the_limit_is_the_median_and_so_many_deviations_of_normal_numbers():
    values = np.random.default_rng(0).normal(3.0, 0.25, 20_001).tolist()
    section = SpikeSection(window=20_001, deviations=8.0)
    assert limit(values, section) == pytest.approx(3.0 + 8 * 0.25, rel=0.02)
    assert limit([*values[:-50], *[1e9] * 50], section) == pytest.approx(3.0 + 8 * 0.25, rel=0.03), "a few jumps hardly move it"
    assert limit(values[1:], section) is None
    assert limit([2.0] * 4, SpikeSection(window=4, deviations=10.0, ratio=1.5)) == 3.0, "equal losses deviate by nothing: both limits hold"


def test_steps_in_a_row_make_a_spike_and_one_alone_does_not():
    calm = [3.0, 3.1, 2.9, 3.0]
    memory, spikes = judged([*calm, 9.0, 3.0, 9.0, 9.0], window=4, patience=2)
    assert spikes == [8] and memory.since == (7, 48) and memory.suspects == 2
    assert memory.recent == [3.1, 2.9, 3.0, 3.0], "suspect steps are not what others are compared with"
    assert judged([9.0, 3.0, 9.0], window=4, patience=1)[1] == [], "too early to judge"
    assert judged([*calm, 9.0], window=4, patience=1)[1] == [5]


def test_a_loss_that_falls_and_one_that_wanders_make_none():
    steps = np.arange(2000)
    noise = np.random.default_rng(1).normal(0, 0.05, 2000)
    assert judged((2.0 + 9 * np.exp(-steps / 100) + noise).tolist())[1] == []
    assert judged((2.0 + 0.3 * np.sin(steps / 200) + noise).tolist())[1] == []


def test_what_is_remembered_is_what_a_checkpoint_gives_back():
    memory, _ = judged([3.0, 3.1, 2.9, 3.0, 9.0], window=4)
    memory.leave_out(6, 40, 8, BadStepsSection())
    again = Memory.of(json.loads(json.dumps(memory.record())))
    assert again == memory and again.since == (5, 32)
    assert Memory.of({}) == Memory() and Memory().record() == {}


def test_so_many_steps_may_be_left_out_in_so_many():
    section, memory = BadStepsSection(on_nan="skip", max_skipped=2, skip_window=10), Memory()
    assert [memory.leave_out(step, 8 * step, 8, section) for step in (3, 5, 13, 15, 16)] == [True, True, True, True, False]


def config(tmp_path: Path, **settings: Any) -> TrainConfig:
    return load_recipe(None, recipe(tmp_path, tmp_path / "run", **from_random(tmp_path), **settings), TrainConfig)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bad_steps__spike__window": 8}, "bad_steps.spike goes back to a checkpoint, and checkpoint.save_interval is none"),
        (
            {"bad_steps__spike__margin": 3, "checkpoint__save_interval": 4, "checkpoint__keep_last": 2},
            r"keep_last=2: 2 may be saved .*patience \+ margin = 5 steps, one each 4\); keep 3",
        ),
        (
            {"bad_steps__on_nan": "skip", "bad_steps__spike__margin": 4, "checkpoint__save_interval": 4, "checkpoint__keep_last": 3},
            r"keep_last=3: 3 may be saved .*patience \+ margin \+ bad_steps.max_skipped = 9 steps, one each 4\); keep 4",
        ),
        ({"bad_steps__spike__deviations": None, "checkpoint__save_interval": 4}, "a spike needs a limit"),
        ({"bad_steps__on_nan": "ignore"}, "'stop' or 'skip'"),
        ({"bad_steps__on_nan": "skip", "precision": "bf16", "fp8__recipe": "delayed"}, "scales remember the step that was left out"),
    ],
)
def test_a_recipe_whose_parts_do_not_fit_is_refused(tmp_path, settings, words):
    with pytest.raises(UserError, match=words):
        config(tmp_path, **settings)


def test_a_spike_is_off_unless_it_is_asked_for_and_on_with_its_defaults(tmp_path):
    assert config(tmp_path).bad_steps.spike is None
    section = config(tmp_path, bad_steps__spike__patience=2, checkpoint__save_interval=100).bad_steps.spike
    assert section == SpikeSection()


def records(run: Path, *numbered: tuple[int, int, int]) -> None:
    """Rollbacks (number, at step, to step), each with a plan that leaves one more sample out."""
    for number, step, to in numbered:
        plans = [{"first_sample": 0, "sources": [{"name": "code"}], "skipped": [{"start": 0, "samples": number}]}]
        bad_steps.write(run, step, {"rollback": number, "step": step, "to_step": to, "data_plans": plans})


def test_a_rollback_counts_for_the_checkpoint_that_it_went_back_to_until_one_tells_of_it(tmp_path):
    records(tmp_path, (1, 110, 100), (2, 112, 100), (3, 140, 120))
    for step, before, history, count in ((100, 0, 2, 2), (100, 1, 2, 2), (120, 2, 3, 3), (100, 2, None, 2), (80, 0, None, 0), (120, 3, None, 3)):
        data = {"seed": 1, "sources": [], **Memory(rollbacks=before).record()}
        found = bad_steps.amended(tmp_path, step, data)
        assert Memory.of(found).rollbacks == count
        assert (found["history"][0]["skipped"][0]["samples"] if history else None) == history and ("history" in found) == (history is not None)


def test_records_of_a_history_that_a_run_began_before_are_forgotten(tmp_path):
    records(tmp_path, (1, 110, 100), (2, 140, 120))
    bad_steps.write(tmp_path, 130, {"step": 130})
    bad_steps.forget_after(tmp_path, 100)
    assert [path.name for path in sorted((tmp_path / "bad_steps").iterdir())] == ["step_00000110_rollback_1.json", "step_00000130.json"]
