"""Sampling refuses what cannot be drawn; stop strings cut at the first one; prompts without room are refused, shortened or cut, as asked."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_prism import generate
from megatron_prism.errors import UserError
from megatron_prism.generate.interface import OnTooLong, Request, Sampling, cut_at_stop
from megatron_prism.generate.room import fit, fit_pairs


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
def test_impossible_sampling_is_refused(wrong: dict[str, Any], rule: str) -> None:
    with pytest.raises(UserError, match=rule):
        Sampling(**wrong)


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


LONG = Request(tuple(range(1, 11)))
"""10 tokens"""


@pytest.mark.parametrize(
    ("on_too_long", "limit", "prompt", "wanted"),
    [
        ("refuse", 14, LONG.prompt, 4),
        ("shorten", 13, LONG.prompt, 3),
        ("shorten", 11, LONG.prompt, 1),
        ("truncate_left", 13, LONG.prompt[1:], 4),
        ("truncate_left", 5, LONG.prompt[-1:], 4),
        ("refuse", None, LONG.prompt, 4),
    ],
)
def test_a_request_fits_as_asked(on_too_long: OnTooLong, limit: int | None, prompt: tuple[int, ...], wanted: int) -> None:
    (fitted,) = fit([LONG], Sampling(max_new_tokens=4), limit, on_too_long)
    assert (fitted.prompt, fitted.max_new_tokens, fitted.prompt_tokens_cut) == (prompt, wanted, 10 - len(prompt))


@pytest.mark.parametrize(
    ("on_too_long", "limit", "fix"),
    [
        ("refuse", 13, r"try max_new_tokens=3, or on_too_long=shorten, or on_too_long=truncate_left$"),
        ("refuse", 9, r"try on_too_long=truncate_left$"),
        ("shorten", 10, r"try on_too_long=truncate_left$"),
        ("shorten", 4, r"try max_new_tokens below 4$"),
        ("truncate_left", 3, r"^2 of 2 prompts .* longest has 10 tokens.*try max_new_tokens below 3$"),
    ],
)
def test_a_request_without_room_is_refused_with_what_would_help(on_too_long: OnTooLong, limit: int, fix: str) -> None:
    with pytest.raises(UserError, match=fix):
        fit([Request((1,)), LONG], Sampling(max_new_tokens=4), limit, on_too_long)


def test_a_request_lowers_the_samplings_limit_and_never_raises_it() -> None:
    asked = [Request((1,), max_new_tokens=limit) for limit in (2, None, 9)]
    assert [fitted.max_new_tokens for fitted in fit(asked, Sampling(max_new_tokens=4), None, "refuse")] == [2, 4, 4]


def test_pairs_keep_their_continuation_whole() -> None:
    assert fit_pairs([((1, 2, 3), (4, 5))], 4, "truncate_left") == [([2, 3], [4, 5])]
    refused: list[tuple[tuple[tuple[int, ...], tuple[int, ...]], int, OnTooLong]] = [
        (((1, 2, 3), (4, 5)), 4, "refuse"),
        (((1, 2), (3, 4, 5)), 3, "truncate_left"),
        (((), (1,)), 4, "refuse"),
    ]
    for pair, positions, on_too_long in refused:
        with pytest.raises(UserError):
            fit_pairs([pair], positions, on_too_long)


def test_wrong_settings_and_folders_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batch_sizes"):
        generate.load(tmp_path, batch_sizes=4)
    with pytest.raises(UserError, match="backend"):
        generate.load(tmp_path, "sglang")
    with pytest.raises(UserError, match=r"holds no config\.json"):
        generate.load(tmp_path)


def test_the_package_imports_no_torch_until_a_backend_is_opened() -> None:
    code = "import sys, megatron_prism.generate, megatron_prism.generate.vllm_backend; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout == "set()\n"
