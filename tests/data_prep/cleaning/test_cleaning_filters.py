"""Filters drop by what they say, each counted under its own name."""

import pytest

from megatron_prism.config import validate
from megatron_prism.data_prep.cleaning.filters import Filters, repeated_line_share, symbol_share
from megatron_prism.data_prep.documents import Extract, read_chunk
from megatron_prism.data_prep.settings import FilterConfig, SourceConfig
from megatron_prism.errors import UserError


@pytest.mark.parametrize(
    ("text", "share"),
    [("abc 123", 0.0), ("a+b", 1 / 3), ("!?\n .", 1.0), ("ü☃é🙂", 0.5), ("   ", 0.0), ("中文。", 1 / 3), ("a\x1c\u2028b", 0.0), ("x_y", 1 / 3)],
)
def test_symbols_are_what_is_neither_letter_digit_nor_space(text, share):
    assert symbol_share(text) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "share"), [("a\nb\nc", 0.0), ("a\na\nb\n\n a \n", 0.5), ("", 0.0), ("\n\n", 0.0), ("x\r\nx\r\nx\r\nx", 0.75), ("one", 0.0)]
)
def test_repeated_lines_are_those_that_stood_before_blank_ones_aside(text, share):
    assert repeated_line_share(text) == pytest.approx(share)


def test_each_rule_drops_its_own_and_limits_themselves_are_kept():
    extract = Extract("text", None, 5, filters=Filters(5, 30, 2, 4, 0.25, 0.4))
    kept = ["ab cd", "a b c d", "x" * 14 + " " + "y" * 15, "ab\nab\ncd", "aa b!"]
    dropped = ["ab", "z" * 31, "onlyone", "a b c d e", "a ?!x b", "ab\nab\nab"]
    found = read_chunk("records", [*kept, *dropped, " "], extract)
    assert found.texts == kept
    assert found.dropped == {
        "shorter than 5 characters": 1,
        "longer than 30 characters": 1,
        "fewer than 2 words": 1,
        "more than 4 words": 1,
        "symbols are more than 0.25 of it": 1,
        "repeated lines are more than 0.4 of it": 1,
    }
    assert found.records == len(found.texts) + sum(found.dropped.values()) + found.empty == 12


def test_a_language_filter_is_a_rule_on_a_column():
    table = {"name": "s", "paths": ["x"], "keep": [{"column": "lang", "one_of": ["en"]}, {"column": "lang_score", "at_least": 0.65}]}
    rules = tuple(keep.rule for keep in validate(table, SourceConfig, where="recipe").keep)
    rows = [{"text": f"{lang} {score}", "lang": lang, "lang_score": score} for lang in ("en", "de") for score in (0.9, 0.3)]
    found = read_chunk("records", rows, Extract("text", None, 5, rules=rules))
    assert found.texts == ["en 0.9"]
    assert found.dropped == {"lang in ['en']": 2, "lang_score >= 0.65": 1}


def test_limits_that_leave_nothing_are_refused():
    with pytest.raises(UserError, match="min_words=9 is more than max_words=3"):
        validate({"min_words": 9, "max_words": 3}, FilterConfig, where="recipe")
