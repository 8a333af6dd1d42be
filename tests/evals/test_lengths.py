"""Scores by length: the mean of one set of tasks at every length, as a curve and a table; nothing where there is one length."""

import re
from typing import Any

import pytest

from megatron_prism.evals import lengths


def figures(accuracy: float, domain: str = "long context", error: float = 0.03) -> dict[str, Any]:
    return {"accuracy": accuracy, "standard_error": error, "domain": domain}


def results(**models: dict[str, Any]) -> dict[str, Any]:
    return {"models": {name: {"tasks": tasks} for name, tasks in models.items()}}


TASKS = {
    "vt-8192": figures(0.5),
    "vt-4096": figures(0.9),
    "niah-4096": figures(0.7, error=0.04),
    "niah-8192": figures(0.3, error=0.04),
    "niah-16384": figures(0.1),
    "mmlu-2024": figures(0.5, "general"),
    "ruler_cwe": figures(0.2),
    "once-4096": figures(1.0),
}


def test_the_mean_is_over_the_tasks_that_are_there_at_every_length() -> None:
    found = lengths.families(results(one=TASKS))
    assert [(family.name, list(family.at)) for family in found] == [("vt", [4096, 8192]), ("niah", [4096, 8192, 16384])]
    points = lengths.mean_at(found, TASKS)
    assert [(point.x, pytest.approx(point.y)) for point in points] == [(4096, 80.0), (8192, 40.0)]
    assert points[0].error == pytest.approx(2.5), "100 * sqrt(0.03^2 + 0.04^2) / 2"


def test_the_section_has_a_curve_a_model_and_a_row_a_task() -> None:
    page = lengths.section(results(one=TASKS, **{"<b>": TASKS}))
    assert page.count("<polyline") == 2 and page.count("<table>") == 2 and "mean of 2 tasks" in page
    assert re.search(r"<th>niah</th><td>70.0</td><td>30.0</td><td>10.0</td>", page)
    assert re.search(r"<th>mean</th><td>80.0</td><td>40.0</td><td>-</td>", page)
    assert "<b>" not in page


def test_one_length_is_no_curve() -> None:
    assert lengths.section(results(one={"vt-4096": figures(0.5), "gcd": figures(0.1, "math")})) == ""
    assert lengths.section({"models": {"one": {}}}) == ""
