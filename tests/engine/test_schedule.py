"""Schedules against closed forms, and what their config refuses."""

import math

import pytest

from megatron_prism.config import validate
from megatron_prism.engine.schedule import ScheduleConfig, factor
from megatron_prism.errors import UserError


def factors(steps: int, **settings: object) -> list[float]:
    config = ScheduleConfig(**settings)
    return [factor(config, step, steps) for step in range(steps + 1)]


def test_warm_up_rises_linearly_and_its_first_step_counts():
    assert factors(10, kind="constant", warmup_steps=4)[:6] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_prism_mid_training_schedule():
    """Table 16: 25,000 steps, warm-up 500, cosine over 24,500 steps to 0.1."""
    found = factors(25_000, kind="cosine", warmup_steps=500, final_lr_fraction=0.1)
    assert found[500] == 1.0
    assert found[500 + 24_500 // 2] == pytest.approx(0.55)
    assert found[25_000] == pytest.approx(0.1)


def test_exponential_decay_passes_the_figures_of_the_long_context_stage():
    """Table 17's decay to 0: 1, 0.65, 0.378, 0.165, 0 at each quarter."""
    found = factors(1_000, kind="exponential", final_lr_fraction=0.0)
    assert [round(found[step], 3) for step in (0, 250, 500, 750, 1_000)] == [1.0, 0.65, 0.378, 0.165, 0.0]
    scale = math.e / (math.e - 1)
    assert found[300] == pytest.approx(scale * math.exp(-0.3) - 1 / (math.e - 1))


def test_linear_decay_may_end_early_and_stays_at_its_end():
    found = factors(10, kind="linear", decay_steps=4, final_lr_fraction=0.2)
    assert found[2] == pytest.approx(0.6)
    assert found[4:] == pytest.approx([0.2] * 7)


def test_wsd_is_stable_then_decays_and_branches_start_where_they_say():
    stable = factors(100, kind="wsd", warmup_steps=10, decay_steps=20, final_lr_fraction=0.0)
    assert stable[10:81] == [1.0] * 71
    assert stable[90] == pytest.approx(0.5)
    branch = factors(60, kind="wsd", warmup_steps=10, decay_steps=20, decay_start=40, final_lr_fraction=0.0, decay_shape="cosine")
    assert branch[:41] == stable[:41]
    assert branch[50] == pytest.approx(0.5)
    assert branch[60] == 0.0


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"kind": "wsd"}, "decay_steps"), ({"kind": "cosine", "decay_start": 5}, "belongs to"), ({"final_lr_fraction": 1.5}, "final_lr_fraction")],
)
def test_impossible_schedules_are_refused_by_name(settings, words):
    with pytest.raises(UserError, match=words):
        validate(settings, ScheduleConfig, where="recipe")
