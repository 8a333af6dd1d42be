"""What the report draws of behaviour.json and cka.json, from such files as their stages write."""

from typing import Any

from report_cases import make

from megatron_prism.analysis import behaviour_page, markup
from megatron_prism.report import inside_sections, parts, weights_section
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
    assert "by right samples of base (up) and right samples of rl (across)" in text
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
    points: list[dict[str, Any]] = [{"point": 0, "mean": 1.0, "low": 1.0, "high": 1.0, "shuffled": 0.3}]
    points.append({"point": 1, "mean": 0.9998, "low": 0.9997, "high": 0.9999, "shuffled": 0.0712})
    each = {"set": "prose", "points": points, "min": {"point": 1, "mean": 0.9998, "std": 2.3e-5}}
    pair = {"label": "base to rl", "paper": None, "sets": [each]}
    content = {"bootstrap": {"draws": 20, "size": 50}, "centred": True, "last_point": "after the final norm", "pairs": [pair]}
    text = section(tmp_path, "cka", "cka", "cka.json", content)
    assert "<td>0.99980 ± 0.00002</td><td>1</td><td>0.0712</td>" in text, "the layer, and what shuffled inputs have there"


def test_words_are_read_from_the_left_numbers_from_the_right_and_a_heading_goes_over_all_columns():
    rows = [parts.Row(["base_data"], "group"), ["code", "general", "-0.5 *", "none", parts.Cell("a b", wrap=True), "-"]]
    text = parts.table(["source", "domain", "change", "left out", "command", "paper"], rows, "sources")
    assert '<th scope="row" colspan=6>base_data</th></tr>' in text
    assert "<td class=text>general</td><td>-0.5 *</td><td class=text>none</td><td class=wrap>a b</td><td>-</td>" in text
    assert [column for column in ("domain", "change", "left out", "command", "paper") if f'class=text>{column}</th>' in text] == [
        "domain", "left out", "command"
    ]  # fmt: skip
    assert markup.words(["fp32 dp=2", ""]) and not markup.words(["-", ""]) and not markup.words(["base", "<1 %"]) and not markup.words([".5"])


def update(label: str, norm: float, paper: dict[str, Any] | None = None) -> dict[str, Any]:
    """What `prism analyze` writes of an update, the whole model and one layer's attention."""
    shares = {str(at): 0.9 for at in (0.1, 0.5, 1, 2, 5, 10)}
    row = {"elements": 1000, "ratio_of_norms": norm, "mean_of_matrices": norm, "identical": {"fp32": 0.5, "bf16": 0.75}, "mean_stable_rank": 3.0}
    row |= {"unchanged": {"fp32": shares, "bf16": shares}}
    groups = [{"kind": "total", "name": "total", "layer": None, **row}, {"kind": "layer component", "name": "attention", "layer": 0, **row}]
    return {"label": label, "groups": groups, "paper": paper, "matrices": []}


def test_the_updates_of_all_analyses_stand_together_first_the_papers_figure_beside_its_own(tmp_path):
    printed = {"row": "granite", "l2": {"total": 0.175}, "changed": {}, "sparsity": 90.7, "unchanged": {}, "caveats": []}
    folders = []
    for name, pair in (("one", update("base to mid", 0.0123, printed)), ("two", update("mid to rl", 0.000456))):
        content = {"pairs": [pair], "cosines": [], "series": None, "models": []}
        folders.append(make(tmp_path / name, "analyze", files={"analysis.json": content}))
    text = weights_section.section(gather(folders))
    summary = text[: text.index("<h3")]
    assert "base to mid</th><td>1 k</td><td>0.0123</td>" in summary and "<td>0.175</td><td>9.3 %</td></tr>" in summary
    assert "mid to rl</th><td>1 k</td><td>0.000456</td>" in summary and "<td>-</td><td>-</td></tr>" in summary
