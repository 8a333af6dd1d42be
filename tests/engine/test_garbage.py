"""Garbage is collected when the loop says so, and as Python has it everywhere else."""

import gc
import weakref

import pytest
from training import from_random, recipe

from megatron_prism.config import load_recipe
from megatron_prism.engine import garbage, loop, parallel
from megatron_prism.engine.recipe import TrainConfig
from megatron_prism.engine.step import train_step


class Knot:
    """What refers to itself, so that only a collection frees it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def collections() -> "list[int]":
    found: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            found.append(info["generation"])

    gc.callbacks.append(note)
    yield found
    gc.callbacks.remove(note)


def test_inside_nothing_is_collected_but_by_hand_and_what_was_there_is_left_out(collections):
    before = gc.get_count()
    assert gc.isenabled() and before
    old = Knot()
    with garbage.by_hand(100):
        collections.clear()
        frozen = gc.get_freeze_count()
        assert frozen > 10_000, "all that is imported"
        knots = [weakref.ref(Knot()) for _ in range(5000)]
        assert collections == [] and all(knot() is not None for knot in knots), "thousands of objects, and no collection"
        gone = weakref.ref(old)
        del old
        gc.collect()
        assert collections == [2] and all(knot() is None for knot in knots)
        assert gone() is not None, "not looked at, which is what makes the collection quick"
    assert gc.isenabled() and gc.get_freeze_count() == 0
    gc.collect()
    assert gone() is None


def test_without_an_interval_python_collects_as_it_does():
    frozen = gc.get_freeze_count()  # Python 3.12 begins with some
    with garbage.by_hand(None):
        assert gc.isenabled() and gc.get_freeze_count() == frozen


def test_after_an_error_all_is_as_it_was():
    with pytest.raises(KeyError), garbage.by_hand(100):
        raise KeyError
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_a_run_collects_after_the_steps_that_are_due_and_no_other(tmp_path, monkeypatch):
    happened: list[object] = []
    monkeypatch.setattr(loop, "train_step", lambda *args, **kwargs: (happened.append("step"), train_step(*args, **kwargs))[1])
    monkeypatch.setattr(loop.gc, "collect", lambda: happened.append("collected"))
    saves = {"checkpoint__save_interval": 3, "steps": 5, "gc_interval": 2, "watchdog": None}
    words = recipe(tmp_path, tmp_path / "run", **saves, **from_random(tmp_path))
    loop.train(load_recipe(None, words, TrainConfig))
    parallel.stop()
    first = happened.index("step")
    assert happened[first : first + 8] == ["step", "step", "collected", "step", "collected", "step", "collected", "step"], happened
