"""Garbage is collected when the loop says so, and as Python has it everywhere else."""

import gc
import weakref

import pytest

from megatron_prism.engine import garbage


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


def test_without_an_interval_python_collects_as_it_does(collections):
    with garbage.by_hand(None):
        assert gc.isenabled() and gc.get_freeze_count() == 0


def test_after_an_error_all_is_as_it_was():
    with pytest.raises(KeyError), garbage.by_hand(100):
        raise KeyError
    assert gc.isenabled() and gc.get_freeze_count() == 0
