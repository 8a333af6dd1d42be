"""Alarms: each rings by its own name where its figure goes astray, and not before its window is full."""

import json
import math

import pytest

from megatron_prism.rl.alarms import AlarmConfig, Watch, check_mismatch

GOOD = {"reward": 0.5, "entropy": 1.0, "length": 100.0, "truncated": 0.0, "kl": 0.01, "gradings": 9.0, "gradings_failed": 0.0}
CONFIG = AlarmConfig(window=3, truncated_above=0.8)
ASTRAY = {
    "entropy_below": {"entropy": 0.01},
    "entropy_above": {"entropy": 4.0},
    "length_below": {"length": 5.0},
    "truncated_above": {"truncated": 1.0},
    "kl_above": {"kl": 2.0},
    "reward_drop": {"reward": 0.1},
    "gradings_failed": {"gradings_failed": 9.0},
}


def watched(*steps: dict[str, float]) -> Watch:
    watch = Watch(3)
    for step in steps:
        watch.see({**GOOD, **step, "lr": 1.0})
    return watch


def test_a_steady_run_rings_nothing():
    assert watched(*[{}] * 20).alarm(CONFIG) is None


@pytest.mark.parametrize("name", ASTRAY)
def test_each_alarm_rings_by_its_name_and_can_be_turned_off(name: str):
    watch = watched(*[{}] * 3, *[ASTRAY[name]] * 3)
    said = watch.alarm(CONFIG)
    assert said is not None and said.startswith(f"alarms.{name}=")
    assert watch.alarm(CONFIG.model_copy(update={name: None})) is None


def test_one_bad_step_is_noise_and_a_window_of_them_is_not():
    assert watched(*[{}] * 3, {"reward": 0.0}, {}, {}).alarm(CONFIG) is None
    assert watched(*[{}] * 3, {}, {"reward": 0.0}, {"reward": 0.0}).alarm(CONFIG) is not None


def test_a_drop_is_counted_from_the_best_window():
    rising = watched(*[{"reward": 0.1}] * 3, *[{"reward": 0.9}] * 3, *[{"reward": 0.4}] * 3)
    assert "0.4 over the last 3 steps, after 0.9" in str(rising.alarm(CONFIG))


def test_rewards_that_were_never_above_zero_cannot_drop():
    assert watched(*[{"reward": -0.1}] * 3, *[{"reward": -0.9}] * 3).alarm(CONFIG) is None


def test_what_is_not_measured_is_not_judged():
    watch = Watch(3)
    for _ in range(6):
        watch.see({"reward": 0.5, "entropy": 1.0, "length": 9.0, "truncated": 0.0})
    assert watch.alarm(CONFIG) is None


def test_a_step_without_kl_does_not_silence_its_alarm_for_ever():
    """A step without an update (all groups equal) has no KL; here the fourth has none, and then the policy runs away."""
    watch, without = Watch(5), {name: value for name, value in GOOD.items() if name != "kl"}
    for figures in (GOOD, GOOD, GOOD, without, *[GOOD | {"kl": 50.0}] * 3, without):
        watch.see(figures)
    said = watch.alarm(AlarmConfig(window=5))
    assert said is not None and said.startswith("alarms.kl_above=1: kl is 50")


def test_graders_that_fail_on_the_few_that_pass_the_format_ring_over_a_window():
    """A step's few failures of 256 responses are no alarm of their own; that all fail for a window is one, and fewer than 16 tell nothing."""
    assert watched(*[{"gradings_failed": 4.0}] * 3).alarm(CONFIG) is None, "fewer than half"
    assert watched(*[{"gradings": 5.0, "gradings_failed": 5.0}] * 3).alarm(CONFIG) is None
    said = watched(*[{"gradings": 6.0, "gradings_failed": 6.0}] * 3).alarm(CONFIG)
    assert said is not None and "18 of 18 gradings failed over the last 3 steps" in said


def test_figures_that_an_earlier_release_did_not_keep_ring_nothing():
    old = {name: value for name, value in GOOD.items() if not name.startswith("gradings")}
    watch = Watch.of(3, {"window": 3, "first": [old] * 3, "recent": [old] * 3, "best": 0.5})
    for _ in range(2):
        watch.see({**GOOD, "gradings_failed": 9.0})
        assert (watch.alarm(CONFIG) is None) == (len([seen for seen in watch.recent if "gradings" in seen]) < 2)


def test_a_watch_that_was_saved_goes_on_as_it_was():
    whole = watched(*[{}] * 4, {"reward": 0.3})
    resumed = Watch.of(3, json.loads(json.dumps(whole.state())))
    for watch in (whole, resumed):
        watch.see({**GOOD, "reward": 0.1})
    assert resumed == whole
    assert Watch.of(5, whole.state()) == Watch(5), "another window begins anew"


def test_a_mismatch_is_judged_at_once_and_no_number_is_over_every_limit():
    assert check_mismatch(0.29, CONFIG) is None
    assert "alarms.mismatch=0.3" in str(check_mismatch(0.31, CONFIG))
    assert check_mismatch(math.nan, CONFIG) is not None
    assert check_mismatch(9.0, AlarmConfig(mismatch=None)) is None
