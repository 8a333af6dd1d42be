"""A run says, once, that a word to stop would find it without the time to save."""

from pathlib import Path

import pytest
from training import from_random, recipe

from megatron_prism.config import SAVE_SECONDS, load_recipe
from megatron_prism.engine import loop
from megatron_prism.engine.recipe import TrainConfig
from megatron_prism.engine.stop_time import StopTime

pytestmark = pytest.mark.usefixtures("leave_groups")


def test_the_longest_step_and_a_save_are_held_to_what_is_allowed() -> None:
    time = StopTime(allowed_seconds=600)
    for now in (1000, 1240, 1300, 1360):  # until 1000: the first step, which compiles
        time.end_step(now)
    assert time.longest_seconds == 240
    assert time.warning(360) is None
    warning = time.warning(420)
    assert warning is not None and "may need 11.0 min" in warning and "its step (4.0 min" in warning and "to save (7.0 min)" in warning
    assert "is ended after 10.0 min" in warning and "save_minutes of the cluster file to 13 or more" in warning
    assert time.warning(420) is None, "once"
    unasked = StopTime(allowed_seconds=None)
    unasked.end_step(0)
    unasked.end_step(1e6)
    assert unasked.warning(1e6) is None


@pytest.mark.parametrize("in_background", [False, True])
def test_a_run_whose_save_takes_longer_than_its_launcher_waits_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], in_background: bool
) -> None:
    monkeypatch.setenv(SAVE_SECONDS, "0.001")
    settings = {"steps": 3, "checkpoint__save_interval": 1, "checkpoint__async_save": in_background, **from_random(tmp_path)}
    loop.train(load_recipe(None, recipe(tmp_path, tmp_path / "run", **settings), TrainConfig))
    said = capsys.readouterr().err
    assert said.count("told to stop, this run may need ") == 1
    assert ("to be written in the background" in said) == in_background
