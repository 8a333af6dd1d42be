"""Scores of a task from its graded responses. Pure functions of small tables; q questions, n samples of each.

accuracy          mean over questions of the mean over samples: avg@n, which is pass@1; a part of an answer, where it counts (RULER), is its share
standard error    clustered by question: samples of one question are not independent draws, so only questions count as such
pass@k            the chance that one of k samples is right, unbiased: 1 - C(n - c, k) / C(n, k), c of n right (Chen et al. 2021, equation 1)
majority@n        the chance that the most frequent answer is right; a response without an answer has no vote, a tie is broken by a fair draw

Owns: these definitions, and keeping apart what a low score may be about: no answer in the asked format, truncation, a grader that failed or ran out
of time. Each of them counts as not correct, and each is reported beside the score.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Record = Mapping[str, Any]
GRADER_FAULTS = ("grader_failed", "timeout")


@dataclass(frozen=True)
class TaskScore:
    """What the responses to a task are worth; shares lie in 0 to 1, log-probabilities are in nats.

    correct: of each question, the mean worth of its samples. pass_at: {k: pass@k}. majority: None where answers have no name to vote for (code).
    majority_ties: share of questions whose vote was tied. graded: the accuracy over the responses whose grader came to a verdict.
    negative_logprob: per sampled token under the model itself, over all tokens; the other two over those of correct and of other responses.
    """

    accuracy: float
    standard_error: float
    num_questions: int
    completions_per_question: int
    correct: dict[str, float]
    pass_at: dict[int, float]
    majority: float | None
    majority_ties: float | None
    no_answer: float
    truncated: float
    grader_failed: float
    timeout: float
    graded: float | None
    mean_tokens: float
    median_tokens: float
    p95_tokens: float
    negative_logprob: float | None
    negative_logprob_correct: float | None
    negative_logprob_incorrect: float | None


def score(records: Iterable[Record], votes: bool = True) -> TaskScore:
    """The score of graded responses, records with an id and the keys in `KEPT`. votes: whether answers can be compared."""
    rows: dict[str, list[Record]] = {}
    for record in records:
        rows.setdefault(record["id"], []).append({key: record[key] for key in KEPT})
    flat = [record for row in rows.values() for record in row]
    correct = {question: sum(map(worth, row)) / len(row) for question, row in rows.items()}
    accuracy, error = mean_and_error(list(correct.values()))
    outcomes = [majority([record["answer"] for record in row], [record["correct"] for record in row]) for row in rows.values()] if votes else []
    reasons = Counter(record["reason"] for record in flat)
    tokens = [record["num_tokens"] for record in flat]
    graded = [worth(record) for record in flat if record["reason"] not in GRADER_FAULTS]
    return TaskScore(
        accuracy=accuracy,
        standard_error=error,
        num_questions=len(rows),
        completions_per_question=max(len(row) for row in rows.values()),
        correct=correct,
        pass_at=mean_pass_at([(len(row), sum(record["correct"] for record in row)) for row in rows.values()]),
        majority=float(np.mean([right for right, _ in outcomes])) if votes else None,
        majority_ties=float(np.mean([tied for _, tied in outcomes])) if votes else None,
        no_answer=reasons["no_answer"] / len(flat),
        truncated=sum(record["finish_reason"] == "length" for record in flat) / len(flat),
        grader_failed=reasons["grader_failed"] / len(flat),
        timeout=reasons["timeout"] / len(flat),
        graded=sum(graded) / len(graded) if graded else None,
        mean_tokens=float(np.mean(tokens)),
        median_tokens=float(np.median(tokens)),
        p95_tokens=float(np.percentile(tokens, 95)),
        negative_logprob=negative_logprob(flat),
        negative_logprob_correct=negative_logprob(record for record in flat if record["correct"]),
        negative_logprob_incorrect=negative_logprob(record for record in flat if not record["correct"]),
    )


def worth(record: Record) -> float:
    """1 for a correct response, the part of one whose parts count, else 0."""
    return float(record["score"]) if record["reason"] == "part" else float(record["correct"])


KEPT = ("correct", "score", "reason", "answer", "finish_reason", "num_tokens", "logprob")
"""of a record: its text may be long, and is not scored"""


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean of the questions' means, and its standard error sqrt(var / q) with the q - 1 variance (0 for a single value)."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def pass_at_k(n: int, correct: int, k: int) -> float:
    """1 - C(n - correct, k) / C(n, k), as a product, which overflows nowhere."""
    assert 0 <= correct <= n and 1 <= k <= n, (n, correct, k)
    if n - correct < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - correct + 1, n + 1)))


def mean_pass_at(counts: Sequence[tuple[int, int]]) -> dict[int, float]:
    """{k: mean over questions of pass@k} for k = 1, 2, 4, ... and the number of samples. counts: (samples, correct ones) of each question."""
    n = min(samples for samples, _ in counts)
    ks = sorted({*(2**power for power in range(n.bit_length())), n})
    return {k: float(np.mean([pass_at_k(samples, correct, k) for samples, correct in counts])) for k in ks if k <= n}


def majority(answers: Sequence[str | None], correct: Sequence[bool]) -> tuple[float, bool]:
    """The chance that the most frequent answer is right, and whether several were the most frequent.

    Answers are one where their text is, without spaces. A tie's chance is the mean over the tied answers; without any answer it is 0.
    """
    votes: dict[str, list[bool]] = {}
    for answer, right in zip(answers, correct, strict=True):
        if answer is not None:
            votes.setdefault("".join(answer.split()), []).append(right)
    if not votes:
        return 0.0, False
    most = max(map(len, votes.values()))
    leading = [sum(found) / len(found) for found in votes.values() if len(found) == most]
    return sum(leading) / len(leading), len(leading) > 1


def negative_logprob(records: Iterable[Record]) -> float | None:
    """Mean -log p of the sampled tokens of responses, every token alike; None where there are none."""
    sums: NDArray[np.float64] = np.array([(record["logprob"], record["num_tokens"]) for record in records], dtype=np.float64).reshape(-1, 2)
    total, tokens = sums.sum(axis=0)
    return float(-total / tokens) if tokens else None


CODE, MATH, SCIENCE = ("livecodebench_v5", "codeforces"), ("aime24", "aime25", "math500"), ("gpqa_diamond",)
"""the paper's six benchmarks, by our tasks' names"""


def paper_weights(tasks: Collection[str]) -> dict[str, float] | None:
    """The weight of each benchmark in the paper's AVG: the mean of Code Avg (LiveCodeBench, Codeforces), Math Avg (AIME'24, AIME'25, MATH500) and
    GPQA-Diamond. None without all six."""
    groups = (CODE, MATH, SCIENCE)
    return {name: 1 / 3 / len(names) for names in groups for name in names} if all(name in tasks for names in groups for name in names) else None


def paper_average(accuracy: Mapping[str, float]) -> float | None:
    """The paper's AVG of {benchmark: accuracy}; None without all six."""
    weights = paper_weights(accuracy)
    return sum(weight * accuracy[name] for name, weight in weights.items()) if weights else None


def plain_average(accuracy: Mapping[str, float]) -> float:
    """The plain mean over tasks; over the six, the paper's page calls this AVG too."""
    return sum(accuracy.values()) / len(accuracy)
