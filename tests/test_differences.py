"""What differs between two tables is told where it differs: by key, by element, and of long values the part that is another."""

from typing import Any

import pytest

from megatron_prism.differences import differences

MODELS = [{"name": name, "path": f"runs/{name}"} for name in ("base", "midtrained", "policy")]
LONG = "a text of a frame that is much longer than what a line shows of it, and that "


def test_each_key_is_named_with_both_values() -> None:
    old, new = {"train": {"steps": 100, "old": 1}, "same": 2}, {"train": {"steps": 200}, "same": 2, "more": {"a": 1}}
    assert differences(old, new) == ["train.steps was 100, now 200", "train.old was 1, now unset", 'more was unset, now {"a": 1}']


@pytest.mark.parametrize(
    ("was", "now", "told"),
    [
        (MODELS, [MODELS[0], {**MODELS[1], "name": "midtrain"}], ['models.1.name was "midtrained", now "midtrain"', "models has 2, had 3"]),
        (MODELS[:2], MODELS, ["models has 3, had 2"]),
        ([0.9, 0.95], [0.9, 0.99], ["models was [0.9, 0.95], now [0.9, 0.99]"]),
        (["a"], ["a", "b"], ['models was ["a"], now ["a", "b"]']),
        ([*range(90)], [*range(89), 7], ["models.89 was 89, now 7"]),
        ([[1, 2]], [[1, 3]], ["models.0 was [1, 2], now [1, 3]"]),
    ],
)
def test_lists_are_compared_element_by_element(was: list[Any], now: list[Any], told: list[str]) -> None:
    assert differences({"models": was}, {"models": now}) == told


def test_of_long_values_the_part_that_differs_is_shown() -> None:
    (told,) = differences({"frame": LONG + "ends so"}, {"frame": LONG + "ends otherwise"})
    assert told == 'frame was ...f it, and that ends so", now ...f it, and that ends otherwise"'
    (told,) = differences({"frame": "x" + LONG * 3}, {"frame": "y" + LONG * 3})
    assert told.startswith('frame was "xa text') and ', now "ya text' in told and len(told) < 200
