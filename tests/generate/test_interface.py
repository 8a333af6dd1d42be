"""Sampling refuses what cannot be drawn; stop strings cut at the first one."""

import pytest

from megatron_prism.errors import UserError
from megatron_prism.generate.interface import Sampling, cut_at_stop


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"temperature": -0.1}, "at least 0"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"n": 0, "temperature": 1.0}, "at least 1"),
        ({"n": 2}, "would all be equal"),
        ({"stop": ("",)}, "empty"),
    ],
)
def test_impossible_sampling_is_refused(wrong: dict[str, object], rule: str) -> None:
    with pytest.raises(UserError, match=rule):
        Sampling(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("abc", (), ("abc", False)),
        ("abc", ("x",), ("abc", False)),
        ("abc", ("c", "b"), ("a", True)),
        ("abc", ("abc",), ("", True)),
    ],
)
def test_text_is_cut_before_the_first_stop_string(text: str, stop: tuple[str, ...], expected: tuple[str, bool]) -> None:
    assert cut_at_stop(text, stop) == expected
