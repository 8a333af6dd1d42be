"""`prism behaviour`: what evaluations and RL have stored becomes the figures that it must; what cannot be compared is refused by name."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_prism import artifact
from megatron_prism.config import Block, load_recipe, validate
from megatron_prism.errors import UserError
from megatron_prism.evals.frames import write_all
from megatron_prism.evals.responses import ResponseFolder, asked
from megatron_prism.grading import Question, Verdict
from megatron_prism.rl import samples_page
from megatron_prism.rl.records import Prompt, Response, Reward
from megatron_prism.rl.rollouts import Group
from megatron_prism.stages import behaviour

TINY = Path(__file__).parents[2] / "examples" / "tiny"
Answered = Mapping[str, Sequence[bool]]
"""question -> whether each of its samples is right"""
Models = dict[str, Path] | list[dict[str, str]]
"""name -> evaluation, or the recipe's own tables"""
PROTOCOL = {"model": "digest", "chat": False, "sampling": {"temperature": 0.6, "max_new_tokens": 8}}


class ByHand(Block):
    """The recipe of an artifact that is made by hand."""

    output: str = ""


def finished(folder: Path, kind: str) -> Path:
    artifact.begin(folder, kind, ByHand())
    return folder


def evaluated(
    folder: Path,
    models: Mapping[str, Mapping[str, Answered]],
    protocol: Mapping[str, Any] = PROTOCOL,
    facts: Mapping[str, Any] | None = None,
    **record: Any,
) -> Path:
    """An evaluation by hand: model -> task -> answers; a right response has 10 tokens of 0.1 nats each, a wrong one 20 of 0.3."""
    finished(folder, "evaluate")
    for model, tasks in models.items():
        for task, answered in tasks.items():
            stored = ResponseFolder(folder, model, task)
            rows = [_record(name, sample, right) | record for name, some in answered.items() for sample, right in enumerate(some)]
            write_all(stored.finished, rows)
            stored.description.write_text(json.dumps({"protocol": protocol, "facts": facts or {}}))
    scores = {model: {"fingerprint": f"of {model}"} for model in models}
    (folder / "scores.json").write_text(json.dumps({"models": scores}))
    artifact.complete(folder)
    return folder


def _record(name: str, sample: int, right: bool) -> dict[str, Any]:
    told = {"id": name, "sample": sample, "asked": asked(Question(f"what is {name}?", "exact", "", {})), "text": "x" * 50, "finish_reason": "stop"}
    graded = {"correct": right, "score": float(right), "reason": "correct" if right else "wrong", "answer": "4"}
    return told | graded | {"num_tokens": 10 if right else 20, "logprob": -1.0 if right else -6.0}


def config(output: Path, models: Models, **values: Any) -> behaviour.Config:
    listed = [{"name": name, "evaluation": str(folder)} for name, folder in models.items()] if isinstance(models, dict) else models
    given = {"models": listed, "output": str(output), "resamples": 200, "least_responses": 1, **values}
    return validate(given, behaviour.Config, "test")


def compared(output: Path, models: Models, **values: Any) -> dict[str, Any]:
    folder = behaviour.run(config(output, models, **values))
    artifact.require(folder, "behaviour")
    return json.loads((folder / "behaviour.json").read_text())


def row(found: dict[str, Any], model: str, task: str | None) -> dict[str, Any]:
    return next(one for one in found["rows"] if (one["model"], one["task"]) == (model, task))


BEFORE = {"a": [False] * 4, "b": [True, False, False, False], "c": [False] * 4}
AFTER = {"a": [True, True, False, False], "b": [True] * 4, "c": [False] * 4}


@pytest.fixture
def both(tmp_path: Path) -> dict[str, Path]:
    folder = evaluated(tmp_path / "scores", {"base": {"sums": BEFORE, "legs": BEFORE}, "midtrain": {"sums": AFTER, "legs": BEFORE}})
    return {"base": folder, "midtrain": folder}


def test_figures_and_changes_of_two_models_are_those_of_a_hand(both, tmp_path):
    found = compared(tmp_path / "out", both)
    base, after = (row(found, name, "sums") for name in ("base", "midtrain"))
    assert (base["questions"], base["samples"], base["responses"], base["correct_responses"]) == (3, 4, 12, 1)
    values = {name: one["value"] for name, one in base["figures"].items()}
    assert values == pytest.approx(
        {"pass_rate": 1 / 12, "median_tokens": 20, "neg_logprob": 67 / 230, "neg_logprob_correct": 0.1, "neg_logprob_incorrect": 0.3}
    )
    assert after["figures"]["pass_rate"]["value"] == pytest.approx(0.5) and after["figures"]["median_tokens"]["value"] == 15
    (pair,) = found["pairs"]
    assert (pair["start"], pair["end"]) == ("base", "midtrain") and [one["task"] for one in pair["rows"]] == ["legs", "sums", None]
    by_task = {one["task"]: one for one in pair["rows"]}
    assert by_task["sums"]["figures"]["pass_rate"]["difference"] == pytest.approx(5 / 12)
    assert by_task["legs"]["figures"]["pass_rate"] == {"difference": 0.0, "low": None, "high": None, "is_difference": False}
    assert by_task[None]["figures"]["pass_rate"]["difference"] == pytest.approx(5 / 24) and by_task[None]["transitions"] is None
    moved = by_task["sums"]["transitions"]
    assert (moved["newly_solved"], moved["lost"], moved["never"], moved["kept"], moved["newly_solved_ids"]) == (1, 0, 1, 1, ["a"])
    assert moved["counts"][0] == [1, 0, 1, 0, 0] and moved["counts"][1] == [0, 0, 0, 0, 1]
    assert row(found, "midtrain", None)["figures"]["pass_rate"]["value"] == pytest.approx((1 / 2 + 1 / 12) / 2)
    assert found["models"][0] == {"name": "base", "evaluation": str(both["base"]), "entry": "base", "fingerprint": "of base", "paper": None}
    assert sum(found["lengths"][0]["counts"]["base"]) == 12 and not found["notes"]


def test_changes_are_drawn_on_the_same_questions_for_both_models(tmp_path):
    """Right wherever the other is, and on 2 of 20 questions more: no draw of questions can make it worse, two draws of its own could."""
    before = {f"q{place}": [place % 2 == 0] for place in range(20)}
    folder = evaluated(tmp_path / "scores", {"base": {"sums": before}, "midtrain": {"sums": {**before, "q1": [True], "q3": [True]}}})
    ((change,),) = (pair["rows"] for pair in compared(tmp_path / "out", {"base": folder, "midtrain": folder})["pairs"])
    found = change["figures"]["pass_rate"]
    assert found["difference"] == pytest.approx(0.1) and found["low"] == 0.0 and found["high"] < 0.3


def test_a_mean_of_two_tasks_is_known_better_than_either(tmp_path):
    """Each task's questions are drawn by themselves: of two tasks the mean's interval is narrower by the square root of two."""
    answered = {f"q{place}": [place % 2 == 0] for place in range(40)}
    folder = evaluated(tmp_path / "scores", {"base": {"sums": answered, "legs": answered}})
    found = compared(tmp_path / "out", {"base": folder}, resamples=2000)
    of_sums, of_both = (row(found, "base", task)["figures"]["pass_rate"] for task in ("sums", None))
    assert of_both["high"] - of_both["low"] == pytest.approx((of_sums["high"] - of_sums["low"]) / 2**0.5, rel=0.15)


def test_models_are_compared_on_the_questions_that_read_the_same(tmp_path):
    one = evaluated(tmp_path / "one", {"base": {"sums": BEFORE}})
    two = evaluated(tmp_path / "two", {"base": {"sums": {"b": [True] * 4, "c": [True] * 4, "d": [True] * 4}}})
    found = compared(tmp_path / "out", _as(one, two))
    (change,) = found["pairs"][0]["rows"]
    assert (change["questions"], change["left_out"]) == (2, [1, 1])
    assert change["figures"]["pass_rate"]["difference"] == pytest.approx(1 - 1 / 8)
    assert row(found, "before", "sums")["questions"] == 3, "a model's own figures are those of all its questions"
    edited = evaluated(tmp_path / "edited", {"base": {"sums": BEFORE}}, asked="another text")
    with pytest.raises(UserError, match=r"before and after have none in common: 3 of before .*, 3 of after .*, 3 of one id that read otherwise"):
        compared(tmp_path / "none", _as(one, edited))


def _as(one: Path, two: Path) -> list[dict[str, str]]:
    return [{"name": name, "evaluation": str(folder), "entry": "base"} for name, folder in (("before", one), ("after", two))]


def test_what_is_not_there_is_named(both, tmp_path):
    other = evaluated(tmp_path / "other", {"rl": {"gcd": AFTER}})
    unfinished = evaluated(tmp_path / "unfinished", {"base": {"sums": BEFORE}})
    (unfinished / "COMPLETE").unlink()
    bare, first_schema = evaluated(tmp_path / "bare", {}), evaluated(tmp_path / "first_schema", {})
    (first_schema / "generations" / "rl").mkdir(parents=True)
    base = both["base"]
    for models, values, message in (
        ({"base": base, "rl": base}, {}, r"holds no responses of a model 'rl' \(models.name=rl\); it has those of base, midtrain: set models.entry"),
        ({"base": base, "rl": bare}, {}, "it asked no tasks"),
        (
            {"base": base, "rl": first_schema},
            {},
            "its generations/ was written by an earlier version, .* evaluate the model again, into another output",
        ),
        ({"base": base, "rl": other}, {}, r"must have answered a task in common, and they have none \(base: legs, sums; rl: gcd\)"),
        (
            {"base": base, "rl": other},
            {"tasks": ["gcd"]},
            r"tasks: gcd was not answered by model base: there is no .*gcd.jsonl.zst; its tasks are legs",
        ),
        ({"base": unfinished}, {}, "has no COMPLETE mark"),
        ({"base": base}, {"pairs": [{"start": "base", "end": "rl"}]}, "rl is no model; models are base"),
        ({"base": base}, {"pairs": [{"start": "base", "end": "base"}]}, "from base to base is no change"),
    ):
        with pytest.raises(UserError, match=message):
            compared(tmp_path / "out", models, **values)
    assert not (tmp_path / "out").exists()


def test_the_paper_s_row_stands_beside_the_task_that_is_named(both, tmp_path):
    listed = [{"name": "base", "evaluation": str(both["base"]), "paper": "llama-3.1-8b/base"}]
    found = compared(tmp_path / "out", listed, paper_task="sums")
    assert found["paper"]["rows"]["base"] == pytest.approx({
        "pass_rate": 0.026, "median_tokens": 158.0, "neg_logprob": 0.758, "neg_logprob_correct": None, "neg_logprob_incorrect": 0.78,
    })  # fmt: skip
    page = (tmp_path / "out" / "behaviour.html").read_text()
    assert page.count("paper (T15)") == 1 and "no entropy" in page
    with pytest.raises(UserError, match=r"paper_task=math500 is none of the tasks \(legs, sums\)"):
        compared(tmp_path / "other", listed)
    with pytest.raises(UserError, match=r"models.paper=llama/base is no row of the paper's T15; rows are granite-3.3-8b/base"):
        compared(tmp_path / "other", [{**listed[0], "paper": "llama/base"}], paper_task="sums")


def test_what_makes_a_comparison_less_than_it_seems_is_said(both, tmp_path):
    hot = evaluated(
        tmp_path / "hot", {"base": {"sums": BEFORE}}, {**PROTOCOL, "model": "other", "sampling": {"temperature": 1.0, "max_new_tokens": 8}}
    )
    found = compared(tmp_path / "out", _as(both["base"], hot))
    (note,) = found["notes"]
    assert note.startswith("sums: responses of before and after were drawn otherwise (sampling.temperature is 0.6 and 1.0)")
    chats = [evaluated(tmp_path / f"chat_{done}", {"base": {"sums": BEFORE}}, {**PROTOCOL, "chat": True}, {"chat": done}) for done in (False, True)]
    (note,) = compared(tmp_path / "chat", _as(*chats))["notes"]
    assert "(chat is False and True)" in note, "a model without a chat template was not asked in one, whatever was asked for"
    three = [*_as(both["base"], hot), {"name": "last", "evaluation": str(hot), "entry": "base"}]
    assert [note.split(" were")[0] for note in compared(tmp_path / "three", three)["notes"]] == [
        f"sums: responses of before and {name}" for name in ("after", "last")
    ]
    old = evaluated(tmp_path / "old", {"base": {"sums": BEFORE}}, logprob=None)
    found = compared(tmp_path / "without", _as(both["base"], old))
    assert found["notes"] == ["Responses without stored log-probabilities: after on sums; those figures are -."]
    assert row(found, "after", "sums")["figures"]["neg_logprob"] is None and row(found, "after", "sums")["figures"]["pass_rate"] is not None


def test_a_page_needs_nothing_but_itself_and_shows_names_as_text(both, tmp_path, capsys):
    listed = [{"name": name, "evaluation": str(both["base"]), "entry": entry} for name, entry in (("[b]<i>base", "base"), ("midtrain", "midtrain"))]
    compared(tmp_path / "out", listed)
    page = (tmp_path / "out" / "behaviour.html").read_text()
    assert not re.search(r"(src|href)\s*=|@import|url\(|https?://(?!www\.w3\.org/2000/svg)", page)
    assert "<i>" not in page and "[b]&lt;i&gt;base" in page and "right samples of midtrain" in page
    assert page.count("<svg") == 7, "of each task lengths, log-probabilities and a matrix; of their mean the log-probabilities"
    assert "[b]<i>base" in capsys.readouterr().out


def test_a_finished_comparison_is_not_made_again(both, tmp_path):
    compared(tmp_path / "out", both)
    before = (tmp_path / "out" / "behaviour.json").stat().st_mtime_ns
    compared(tmp_path / "out", both)
    assert (tmp_path / "out" / "behaviour.json").stat().st_mtime_ns == before


def test_the_tiny_example_compares_the_quickstart_s_models():
    found = load_recipe(TINY / "behaviour.toml", [], behaviour.Config)
    assert [model.stored_as for model in found.models] == ["base", "midtrained"] and found.models[0].evaluation == Path("runs/tiny/evaluate")


# --- prompts through RL ---


def kept(run: Path, steps: Mapping[int, Mapping[str, Sequence[bool | None]]]) -> Path:
    """A run of RL with kept samples, as RL writes them; None is a grading that failed."""
    finished(run, "rl")
    for step, prompts in steps.items():
        groups = [_group(name, right) for name, right in prompts.items()]
        samples_page.keep(run, step, groups, [[0.0] * len(group.responses) for group in groups], str)
    artifact.complete(run)
    return run


def _group(name: str, right: Sequence[bool | None]) -> Group:
    prompt = Prompt(name, "math", Question(name, "exact", "", {"answer": "4"}), (1,))
    responses = tuple(Response(prompt, place, (1,), (True,), (-1.0,), "4", "stop", 0) for place in range(len(right)))
    verdicts = [Verdict(bool(value), float(bool(value)), "grader_failed" if value is None else "correct" if value else "wrong") for value in right]
    rewards = tuple(Reward(verdict.score, verdict, True, failed=value is None) for verdict, value in zip(verdicts, right, strict=True))
    return Group(prompt, responses, rewards)


def counted(folder: Path, counts: Mapping[str, tuple[int, int]] | None) -> Path:
    """An output of `prism prompts`: prompt -> right samples, gradings that failed; of 16."""
    finished(folder, "prompts")
    rows = [{"id": name, "domain": "math", "right": right, "samples": 16, "failed": failed} for name, (right, failed) in (counts or {}).items()]
    if counts is not None:
        (folder / "pass_counts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    artifact.complete(folder)
    return folder


def test_prompts_of_the_filter_are_followed_through_the_steps_that_rl_kept(both, tmp_path):
    run = kept(
        tmp_path / "rl",
        {
            1: {"p0": [False, False, True, False], "p1": [True, False, False, None], "easy": [True] * 4},
            20: {"p0": [True, True, True, False], "torn": [True] * 4, "new": [True] * 4},
        },
    )
    prompts = counted(tmp_path / "prompts", {"p0": (0, 0), "p1": (1, 0), "easy": (9, 0), "torn": (0, 3)})
    found = compared(tmp_path / "out", both, rl={"run": str(run), "prompts": str(prompts)})
    zero, one = found["rl"]["curves"]
    assert (found["rl"]["samples"], found["rl"]["steps"], zero["domain"]) == (16, [1, 20], None)
    assert [(point["step"], point["prompts"], point["pass_rate"]) for point in zero["points"]] == [(1, 1, 0.25), (20, 1, 0.75)]
    assert [(point["responses"], point["pass_rate"]) for point in one["points"]] == [(3, pytest.approx(1 / 3))], "a grading that failed says nothing"
    assert found["notes"] == ["RL asked 2 prompts that the filter did not count; they are in no curve."]
    assert "0/16 in the filter" in (tmp_path / "out" / "behaviour.html").read_text()


def test_runs_and_filters_that_do_not_belong_together_are_refused(both, tmp_path):
    run = kept(tmp_path / "rl", {1: {"p0": [True]}})
    empty = kept(tmp_path / "empty", {})
    prompts, others = counted(tmp_path / "prompts", {"p0": (0, 0)}), counted(tmp_path / "others", {"q0": (0, 0)})
    plain = counted(tmp_path / "plain", None)
    for rl, message in (
        ((run, others), r"asked prompts such as 'p0', and rl.prompts=.* counted others, such as 'q0'"),
        ((run, plain), "holds no pass_counts.jsonl: it was made without a solvability block"),
        ((empty, prompts), r"holds no samples/step_\*.jsonl.zst"),
        ((tmp_path / "none", prompts), "does not exist"),
        ((run, both["base"]), "is an output of prism evaluate, but an output of prism prompts is needed here"),
    ):
        with pytest.raises(UserError, match=message):
            compared(tmp_path / "out", both, rl={"run": str(rl[0]), "prompts": str(rl[1])})


def drawn_at(value: float | None) -> dict[str, Any]:
    return {**PROTOCOL, "sampling": {"max_new_tokens": 8} if value is None else {"temperature": value, "max_new_tokens": 8}}


def test_of_greedy_answers_nothing_is_expected_of_chance(tmp_path, capsys):
    one = {"a": [False], "b": [True], "c": [False]}
    folder = evaluated(tmp_path / "scores", {"base": {"sums": one}, "midtrain": {"sums": {**one, "a": [True]}}}, drawn_at(0.0))
    found = compared(tmp_path / "out", {"base": folder, "midtrain": folder})
    moved = found["pairs"][0]["rows"][0]["transitions"]
    assert (moved["newly_solved"], moved["expected"]) == (1, None)
    assert re.search(r"base to midtrain +1 +- +0 +- +1 +1", capsys.readouterr().out)
    page = (tmp_path / "out" / "behaviour.html").read_text()
    assert "By chance: how many" not in page and "base, midtrain answered greedily (temperature 0)" in page


def test_where_a_temperature_is_not_recorded_the_page_says_what_chance_assumes(tmp_path):
    folder = evaluated(tmp_path / "scores", {"base": {"sums": BEFORE}, "midtrain": {"sums": AFTER}}, drawn_at(None))
    found = compared(tmp_path / "out", {"base": folder, "midtrain": folder})
    assert found["pairs"][0]["rows"][0]["transitions"]["expected"] is not None
    assert found["notes"] == ["sums: the temperature of base, midtrain is not recorded; what chance would move assumes answers drawn at random."]
