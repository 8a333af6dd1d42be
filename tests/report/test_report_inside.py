"""What the report draws of behaviour.json and cka.json, from such files as their stages write."""

from typing import Any

from report_cases import make

from megatron_prism.analysis import behaviour_page
from megatron_prism.report import inside_sections
from megatron_prism.report.runs import gather

CHANGE = {"difference": 0.1, "low": 0.05, "high": 0.2, "is_difference": True}


def moved(**more: Any) -> dict[str, Any]:
    """Of 40 questions, of two samples before and one after: 34 solved anew, 2 lost."""
    found = {"samples": [2, 1], "counts": [[1, 34], [2, 0], [0, 3]], "newly_solved": 34, "lost": 2, "never": 1, "kept": 3}
    return {**found, "expected": {"newly_solved": 17.04, "lost": 18.96}, "newly_solved_ids": [], "lost_ids": [], **more}


def results(figures: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Two models on one task."""
    row = {"task": "sums", "questions": 40, "left_out": [0, 0], "figures": figures or {"pass_rate": CHANGE}, "transitions": moved(**more)}
    pairs = [{"start": "base", "end": "rl", "rows": [row]}]
    return {"confidence": 0.95, "rows": [], "pairs": pairs, "lengths": [], "paper": None, "rl": None, "notes": []}


def section(tmp_path, name, kind, file, content):
    folder = make(tmp_path / kind, kind, files={file: content})
    return inside_sections.SECTIONS[name](gather([folder]))


def behaviour(tmp_path, found):
    return section(tmp_path, "behaviour", "behaviour", "behaviour.json", found)


def test_solved_and_lost_are_drawn_with_the_start_up_and_the_end_across_as_on_behaviours_own_page(tmp_path):
    text = behaviour(tmp_path, results())
    assert "right samples of base (up), right samples of rl (across)" in text
    assert "right samples of rl 1/1, right samples of base 0/2: 34" in text, "34 of those that base solved in none of 2 samples"
    assert behaviour_page.matrix("base", "rl", moved()) in text


def test_too_many_samples_for_a_map_are_said(tmp_path):
    assert "Too many samples a question for a map." in behaviour(tmp_path, results(samples=[64, 64]))


def test_what_chance_would_move_is_said_where_answers_are_drawn_at_random_alone(tmp_path):
    assert "1 never solved; by chance alone 17.0 and 19.0 would change sides." in behaviour(tmp_path / "drawn", results())
    greedy = behaviour(tmp_path / "greedy", results(expected=None))
    assert "34 newly solved, 2 lost, 3 kept, 1 never solved." in greedy and "chance" not in greedy


def test_changes_are_written_as_in_behaviours_own_table(tmp_path):
    small = {"difference": -0.0012, "low": -0.0021, "high": -0.0003, "is_difference": True}
    none = {"difference": 0.0, "low": -0.0, "high": 0.0, "is_difference": False}
    text = behaviour(tmp_path, results(figures={"median_tokens": none, "neg_logprob": small}))
    assert "<td>0<small>0 to 0</small></td><td>-0.001 *<small>-0.002 to -0.0003</small></td>" in text


def test_a_small_spread_of_cka_is_written_with_its_digit(tmp_path):
    points = [{"point": 0, "mean": 1.0, "low": 1.0, "high": 1.0}, {"point": 1, "mean": 0.9998, "low": 0.9997, "high": 0.9999}]
    each = {"set": "prose", "points": points, "min": {"point": 1, "mean": 0.9998, "std": 2.3e-5}}
    pair = {"label": "base to rl", "paper": None, "sets": [each]}
    content = {"bootstrap": {"draws": 20, "size": 50}, "centred": True, "last_point": "after the final norm", "pairs": [pair]}
    assert "0.99980 ± 0.00002" in section(tmp_path, "cka", "cka", "cka.json", content)
