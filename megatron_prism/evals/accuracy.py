"""Accuracy of a model on a task: generate, grade, average.

Owns: the score of a task with its standard error, and the record of every completion. A question's score is the mean over its completions
(pass@1, also called avg@n); a task's is the mean over questions; the standard error counts questions as the independent draws.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_prism.evals.registry import Task
from megatron_prism.generate.interface import Completion, Generator, Progress, Sampling
from megatron_prism.grading import Question, Verdict, verdict


@dataclass(frozen=True)
class TaskScore:
    """accuracy, standard_error, no_answer, grader_failed, truncated: shares, 0 to 1. mean_tokens: tokens per completion."""

    accuracy: float
    standard_error: float
    num_questions: int
    completions_per_question: int
    no_answer: float
    grader_failed: float
    truncated: float
    mean_tokens: float


def evaluate_task(
    generator: Generator, task: Task, questions: Sequence[Question], sampling: Sampling, progress: Progress | None = None
) -> tuple[TaskScore, list[dict[str, Any]]]:
    """The score, and one record per completion (question, text, verdict)."""
    completions = generator.generate([task.prompt_for(question) for question in questions], sampling, progress)
    verdicts = [[verdict(question, completion.text) for completion in row] for question, row in zip(questions, completions, strict=True)]
    records = [
        _record(question, completion, decided)
        for question, row, decisions in zip(questions, completions, verdicts, strict=True)
        for completion, decided in zip(row, decisions, strict=True)
    ]
    return score(verdicts, completions), records


def score(verdicts: Sequence[Sequence[Verdict]], completions: Sequence[Sequence[Completion]]) -> TaskScore:
    """Sum up verdicts [question][completion]."""
    accuracies = [sum(decided.correct for decided in row) / len(row) for row in verdicts]
    accuracy, error = mean_and_error(accuracies)
    flat = [completion for row in completions for completion in row]
    reasons = Counter(decided.reason for row in verdicts for decided in row)
    return TaskScore(
        accuracy=accuracy,
        standard_error=error,
        num_questions=len(verdicts),
        completions_per_question=len(verdicts[0]),
        no_answer=reasons["no_answer"] / len(flat),
        grader_failed=reasons["grader_failed"] / len(flat),
        truncated=sum(completion.finish_reason == "length" for completion in flat) / len(flat),
        mean_tokens=sum(len(completion.tokens) for completion in flat) / len(flat),
    )


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error sqrt(var / n) with the n - 1 variance (0 for a single value)."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def _record(question: Question, completion: Completion, decided: Verdict) -> dict[str, Any]:
    return {
        "id": question.id,
        "question": question.text,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "num_tokens": len(completion.tokens),
        "logprob": sum(completion.logprobs),
        **asdict(decided),
    }
