"""What is said about scores: tables with stars, notes and the paper's figures, sentences about what was no answer, a page that is safe to open."""

import json
import re
from typing import Any

import pytest

from megatron_prism.errors import UserError
from megatron_prism.evals import report, results, table
from megatron_prism.evals.evaluation import paper_figures
from megatron_prism.evals.scores import score

SIX = ("livecodebench_v5", "codeforces", "aime24", "aime25", "math500", "gpqa_diamond")


def _task(right: int, questions: int = 40, n: int = 2, **changes: Any) -> dict[str, Any]:
    """Scores of a task on which the first `right` questions are answered right in every sample."""
    from dataclasses import asdict

    base = {"answer": "1", "finish_reason": "stop", "num_tokens": 5, "logprob": -1.0}
    rows = [
        {"id": f"q{place:03}", "correct": place < right, "score": float(place < right), "reason": "correct" if place < right else "wrong", **base}
        for place in range(questions)
        for _ in range(n)
    ]
    found = asdict(score(rows)) | {"without_template": 0, "prompts_cut": 0.0, "out_of_context": 0.0, "grading_seconds": 0.1}
    return found | changes


def _scores(**models: dict[str, Any]) -> dict[str, Any]:
    return {name: {"tasks": tasks} for name, tasks in models.items()}


def test_a_star_marks_a_difference_and_only_that() -> None:
    scores = _scores(a={"x": _task(10), "y": _task(10)}, b={"x": _task(35), "y": _task(11)})
    found = results.of(scores, ["a", "b"])
    cells = {row.label: row.cells for row in table.rows(found)}
    assert cells["x: accuracy, %"][1].endswith("*")
    assert not cells["y: accuracy, %"][1].endswith("*")
    assert cells["plain mean, %"] == ("25.0", "57.5 *")
    assert any("differs from a" in note for note in table.notes_of(found))
    assert "paired bootstrap" in table.markdown(found)
    alike = results.of(_scores(a={"x": _task(10)}, b={"x": _task(10)}), ["a", "b"])
    assert table.notes_of(alike) == []


def test_both_averages_stand_beside_each_other_and_the_papers_figures_below_ours() -> None:
    tasks = {name: _task(right) for name, right in zip(SIX, (4, 8, 12, 16, 20, 24), strict=True)}
    scores = _scores(base=tasks, trained=tasks)
    scores["trained"]["paper"] = paper_figures("granite-3.3-8b/mcs", [*SIX, "average"])
    found = results.of(scores, ["base", "trained"])
    cells = {row.label: row.cells for row in table.rows(found)}
    assert cells["plain mean, %"][0] == "35.0"
    assert cells["AVG (code, math, GPQA), %"][0] == f"{(15 + 40 + 60) / 3:.1f}"
    assert cells["math500: in the paper, %"] == ("-", "81.1")
    assert cells["AVG: in the paper, %"] == ("-", "29.5")
    assert any(note.startswith("Paper, T11") for note in table.notes_of(found))


def test_a_row_that_the_paper_does_not_have_is_refused() -> None:
    with pytest.raises(UserError, match="has no figures of 'granite-9/mcs'"):
        paper_figures("granite-9/mcs", ["aime24"])


def test_what_was_no_answer_is_said_in_words() -> None:
    shares = {"no_answer": 0.972, "truncated": 0.25, "timeout": 0.01, "grader_failed": 0.004, "without_template": 40}
    lines = table.summary(results.of(_scores(a={"x": _task(1, **shares)}), ["a"]))
    assert lines == [
        "a, x: 97% gave no answer in the asked format, 25% ran into max_new_tokens, 1% could not be graded in the grader's time, "
        "all 40 questions were asked without a chat template, which the model lacks"
    ]


def test_models_come_in_the_recipes_order_and_checkpoints_by_step() -> None:
    scores = _scores(step_100={"x": _task(3)}, step_20={"x": _task(2)}, base={"x": _task(1)}, also={"x": _task(1)})
    found = results.of(scores, ["base", "also"])
    assert list(found["models"]) == ["base", "also", "step_20", "step_100"]
    assert {line["against"] for line in found["comparisons"]} == {"base"}


def test_details_name_every_count() -> None:
    found = results.of(_scores(a={"x": _task(10)}), ["a"])
    labels = [row.label for row in table.details(json.loads(json.dumps(found)), "x")]  # as read back from scores.json, where keys are text
    assert labels[:3] == ["avg@2, %", "pass@2, %", "majority, %"]
    for label in (
        "gave no answer in the asked format, %",
        "could not be graded in the grader's time, %",
        "-log p a token",
        "tokens, 95th percentile",
    ):
        assert label in labels


def test_a_response_cannot_break_out_of_the_page() -> None:
    text = '</script><script>alert("{{limits}} {{data}}")</script>'
    shown = [{"model": "a", "task": "x", "id": "q0", "sample": 0, "prompt": text, "text": text, "reason": "wrong", "answer": None, "detail": None}]
    page = report.page(results.of(_scores(a={"x": _task(1)}), ["a"]), shown)
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    assert json.loads(data[1])[0]["text"] == text
    assert page.count("<script") == 2
    assert "alert(" not in page.replace(data[1], "")
