"""The quickstart's text is real, the same each time, right, and never holds an evaluation question."""

import importlib.util
import re
import tomllib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest

from megatron_prism.evals.registry import load_task
from megatron_prism.grading import Question, verdict

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny"
TASKS = tomllib.loads((TINY / "evaluate.toml").read_text())["tasks"]["names"]


def _corpus(name: str) -> Callable[..., Iterator[str]]:
    spec = importlib.util.spec_from_file_location("tiny_corpus", TINY / "corpus.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)  # type: ignore[no-any-return]


def _task_sources() -> list[dict[str, object]]:
    recipes = [tomllib.loads((TINY / name).read_text()) for name in ("base_data.toml", "midtrain_data.toml", "tokenizer.toml")]
    return [source["arguments"] for recipe in recipes for source in recipe["source"] if source["function"].endswith(":tasks")]


@pytest.mark.parametrize("name", ["prose", "code"])
def test_prose_and_code_are_plenty_and_the_same_each_time(name: str) -> None:
    first, second = list(_corpus(name)()), list(_corpus(name)())
    assert first == second
    assert sum(len(text) for text in first) > 900_000
    assert len(first) > 20


def test_no_held_out_question_is_in_any_training_text() -> None:
    held_out = {question.text for name in TASKS for question in load_task(name).questions()}
    assert len(held_out) > 150
    for arguments in _task_sources():
        for text in _corpus("tasks")(**arguments):
            assert not any(question in held_out for question in _questions(text)), text


def _questions(text: str) -> list[str]:
    """Every text that ends at a line break: a question may have several lines."""
    return [text[: match.start()] for match in re.finditer(r"\n", text)]


@pytest.mark.parametrize("arguments", _task_sources(), ids=lambda arguments: "-".join(str(value) for value in arguments.values()))
def test_every_worked_answer_is_graded_correct(arguments: dict[str, object]) -> None:
    task = load_task(str(arguments["task"]))
    settings = {key: value for key, value in arguments.items() if key not in ("task", "form", "count")}
    entries = task.model_copy(update={"params": {**task.params, **settings}}).training_entries(0, 200)
    for entry, text in zip(entries, islice(_corpus("tasks")(**arguments), 200), strict=False):
        question = Question(entry["question"].strip(), task.source, task.dataset, entry, task.extraction)
        assert text.startswith(task.prompt_for(question))
        assert verdict(question, text.removeprefix(task.prompt_for(question))).correct


def test_the_steps_of_a_sum_are_its_running_totals() -> None:
    assert _corpus("running_totals")({"expression": "6 + 4 - 7 - 8"}) == " 06 10 03 -05"


def test_the_steps_of_counting_legs() -> None:
    assert _corpus("legs")({"animals": {"bee": 3, "dog": 2}}) == " 3x06=018\n 2x04=008\n 018+008=026"
