"""How figures of behaviour, CKA and angles are written: zero has no sign, and nothing looks like zero that is not."""

import pytest
from report_cases import make

from megatron_prism.analysis import behaviour_table, cka_page, table
from megatron_prism.report import weights_section
from megatron_prism.report.runs import gather


def change(low: float, value: float, high: float) -> dict[str, float | bool]:
    return {"difference": value, "low": low, "high": high, "is_difference": not low <= 0 <= high}


@pytest.mark.parametrize(
    ("figure", "ends", "written"),
    [
        ("median_tokens", (-0.0, 0.0, 0.0), "0 [0, 0]"),
        ("median_tokens", (0.0, 0.5, 1.0), "+0.5 [0, 1]"),
        ("neg_logprob", (-0.0021, -0.0012, -0.0003), "-0.001 [-0.002, -0.0003]*"),
        ("neg_logprob", (-0.4, -0.3, -0.2), "-0.300 [-0.400, -0.200]*"),
        ("pass_rate", (-0.01, 1e-17, 0.01), "0.0 [-1.0, 1.0]"),
    ],
    ids=["zeros", "half a token", "a small one", "a plain one", "what rounding leaves"],
)
def test_a_change_has_the_digits_that_it_needs_and_zero_no_sign(figure, ends, written):
    assert behaviour_table.change(figure, change(*ends)) == written


def test_an_end_that_would_look_like_zero_has_more_digits():
    assert behaviour_table.cell("neg_logprob", {"value": 0.01, "low": 0.0002, "high": 0.02}) == "0.010 [0.0002, 0.020]"
    assert behaviour_table.cell("pass_rate", {"value": 0.5, "low": None, "high": None}) == "50.0"
    assert behaviour_table.cell("neg_logprob", {"value": 0.01, "low": 0.0002, "high": 0.02}, interval=False) == "0.010"


@pytest.mark.parametrize(("std", "written"), [(0.0, "0.9998"), (2.3e-5, "0.99980 ± 0.00002"), (0.07, "0.9998 ± 0.0700")])
def test_a_spread_is_never_written_as_zero_when_it_is_none(std, written):
    assert cka_page.with_spread(0.9998, std) == written


def test_a_cosine_of_nearly_one_is_not_written_as_one():
    assert (table.cosine(0.99991), table.cosine(None)) == ("0.9999", "-")


def test_the_terminal_and_the_report_write_an_angle_alike(capsys, tmp_path):
    groups = [{"kind": "total", "layer": None, "name": "total", "cosine": 0.99991}]
    angle = {"one": "a to b", "other": "a to c", "groups": groups}
    table.show({"pairs": [], "cosines": [angle], "series": None})
    assert "cosine of a to b and a to c: total 0.9999" in capsys.readouterr().out
    analysis = {"pairs": [], "cosines": [angle], "series": None}
    folder = make(tmp_path / "weights", "analyze", files={"analysis.json": analysis})
    assert "<td>0.9999</td>" in weights_section.section(gather([folder]))
