"""Accuracy is the mean over questions of the mean over completions; the record of every completion is kept."""

import math
from collections.abc import Sequence

import pytest

from megatron_prism.evals.accuracy import evaluate_task, mean_and_error
from megatron_prism.evals.registry import Task
from megatron_prism.generate.interface import Completion, Progress, Prompt, Sampling


class Scripted:
    """A generator that answers what it is told to: the only way to know the true score."""

    def __init__(self, answers: list[list[str]]):
        self.answers = answers
        self.prompts: list[Prompt] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, progress: Progress | None = None) -> list[list[Completion]]:
        self.prompts = list(prompts)
        return [[Completion(text, (1, 2), "length" if not text else "stop", (-1.0, -0.5)) for text in row] for row in self.answers]


def _task() -> Task:
    return Task(name="sums", domain="math", dataset="chain_sum", prompt="Q: {question}\n", num_questions=4)


def test_the_score_of_known_answers() -> None:
    task = _task()
    questions = task.questions()
    oracle = [question.entry["answer"] for question in questions]
    answers = [
        [f"Answer: {oracle[0]}", f"Answer: {oracle[0]}"],
        [f"Answer: {oracle[1]}", "no idea"],
        ["Answer: x", "Answer: x"],
        ["", f"so\nAnswer: {oracle[3]}"],
    ]
    generator = Scripted(answers)
    score, records = evaluate_task(generator, task, questions, Sampling(temperature=1.0, n=2))
    assert generator.prompts == [f"Q: {question.text}\n" for question in questions]
    assert score.accuracy == pytest.approx((1 + 0.5 + 0 + 0.5) / 4)
    assert score.standard_error == pytest.approx(math.sqrt((0.5**2 + 0.5**2) / 3 / 4))
    assert (score.no_answer, score.truncated, score.grader_failed, score.mean_tokens) == (2 / 8, 1 / 8, 0, 2)
    assert [record["reason"] for record in records] == ["correct", "correct", "correct", "no_answer", "wrong", "wrong", "no_answer", "correct"]
    assert records[3]["text"] == "no idea"
    assert records[0]["logprob"] == -1.5


def test_the_standard_error_of_yes_and_no_is_the_binomial_one() -> None:
    mean, error = mean_and_error([1.0] * 30 + [0.0] * 70)
    assert mean == pytest.approx(0.3)
    assert error == pytest.approx(math.sqrt(0.3 * 0.7 / 99))
    assert mean_and_error([1.0]) == (1.0, 0.0)
