"""How a model answers, from its graded responses: pass rate, length, negative log-probability, each with an interval over questions. Pure; no torch.

    pass_rate               mean over questions of the mean worth of a question's samples
    median_tokens           median number of tokens of a response, over all responses
    neg_logprob             mean of -log p over sampled tokens, every token alike, p under the model itself at temperature 1: no entropy
    neg_logprob_correct     the same over the tokens of correct responses
    neg_logprob_incorrect   and over those of the others

Intervals are a bootstrap over questions: a question is drawn again with all of its samples, since those are no independent draws. Two models are
compared on the same questions, drawn together. A mean over tasks draws within each task, and every task counts alike in it.
Owns: these definitions. A figure that has too little to stand on is None.
Shapes: d draws, q questions, r responses.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prism.evals.compare import CONFIDENCE, ROUNDING
from megatron_prism.evals.scores import worth

FIGURES = ("pass_rate", "median_tokens", "neg_logprob", "neg_logprob_correct", "neg_logprob_incorrect")
MOST_UNDEFINED = 0.01
"""share of draws in which a figure may be undefined (no correct response among the drawn questions) for its interval to be one"""
FEWEST_QUESTIONS = 5
"""that are drawn again: a bootstrap of fewer is narrower than what is not known"""
CELLS = 1 << 22
"""of a table of draws by responses that is held at a time"""
Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Answers:
    """One model's responses to one task. question_r: place in `questions`; logprob_r: summed over a response's tokens, NaN where it is not stored."""

    questions: tuple[str, ...]
    question_r: NDArray[np.int64]
    worth_r: Floats
    correct_r: NDArray[np.bool_]
    tokens_r: NDArray[np.int64]
    logprob_r: Floats

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]]) -> "Answers":
        """From graded responses; questions in order of first appearance."""
        places: dict[str, int] = {}
        rows = []
        for record in records:
            logprob = record.get("logprob")
            place = places.setdefault(record["id"], len(places))
            rows.append((place, worth(record), record["correct"], record["num_tokens"], math.nan if logprob is None else logprob))
        columns: Sequence[Sequence[Any]] = list(zip(*rows, strict=True)) or [()] * 5
        return cls(
            questions=tuple(places),
            question_r=np.array(columns[0], dtype=np.int64),
            worth_r=np.array(columns[1], dtype=np.float64),
            correct_r=np.array(columns[2], dtype=np.bool_),
            tokens_r=np.array(columns[3], dtype=np.int64),
            logprob_r=np.array(columns[4], dtype=np.float64),
        )

    def only(self, questions: Sequence[str]) -> "Answers":
        """Those to some of the questions, in the order given."""
        places = {name: place for place, name in enumerate(questions)}
        new_q = np.array([places.get(name, -1) for name in self.questions], dtype=np.int64)
        question_r = new_q[self.question_r]
        kept = question_r >= 0
        return Answers(tuple(questions), question_r[kept], self.worth_r[kept], self.correct_r[kept], self.tokens_r[kept], self.logprob_r[kept])

    @property
    def samples_q(self) -> Counts:
        """Responses to each question."""
        return np.bincount(self.question_r, minlength=len(self.questions))

    @property
    def right_q(self) -> Counts:
        """Correct responses to each question."""
        return np.bincount(self.question_r[self.correct_r], minlength=len(self.questions))

    def responses(self, figure: str) -> NDArray[np.bool_]:
        """Which responses a figure is about."""
        return {"neg_logprob_correct": self.correct_r, "neg_logprob_incorrect": ~self.correct_r}.get(figure, np.ones_like(self.correct_r))


Drawn = dict[str, Floats]
"""figure -> its value in each draw, NaN where it is undefined; the first is that of the questions as they are"""


def resampled(answers: Answers, resamples: int, seed: Sequence[int], least_responses: int) -> Drawn:
    """Every figure in every draw; one seed draws the same of equally many questions. least_responses: a figure about fewer is undefined."""
    parts = [_figures(answers, counts) for counts in _draws(len(answers.questions), resamples, seed, len(answers.question_r))]
    found = {name: np.concatenate([part[name] for part in parts]) for name in FIGURES}
    for name in FIGURES:
        if answers.responses(name).sum() < least_responses and name not in ("pass_rate", "median_tokens", "neg_logprob"):
            found[name] = np.full_like(found[name], np.nan)
    return found


def mean_over(tasks: Sequence[Drawn]) -> Drawn:
    """Each figure's mean over tasks, every task alike; undefined where one of them is."""
    return {name: np.mean([task[name] for task in tasks], axis=0) for name in FIGURES}


def figure(drawn_d: Floats) -> dict[str, float | None] | None:
    """A value with its interval, which is None where too many draws are undefined or questions are few; None where the value is undefined."""
    value = float(drawn_d[0])
    low, high = _interval(drawn_d[1:])
    return {"value": value, "low": low, "high": high} if math.isfinite(value) else None


def difference(start_d: Floats, end_d: Floats) -> dict[str, float | bool | None] | None:
    """End less start, of the same draws; a difference is one where the interval leaves 0 out."""
    change_d = end_d - start_d
    value = float(change_d[0])
    low, high = _interval(change_d[1:])
    if not math.isfinite(value):
        return None
    is_difference = low is not None and high is not None and (low > ROUNDING or high < -ROUNDING)
    return {"difference": value, "low": low, "high": high, "is_difference": is_difference}


def mean_interval(values: Sequence[float], resamples: int, seed: Sequence[int]) -> tuple[float | None, float | None]:
    """The interval of a mean of questions' values."""
    values_q = np.array(values, dtype=np.float64)
    return _interval(np.concatenate([counts @ values_q / len(values_q) for counts in _draws(len(values_q), resamples, seed, len(values_q))])[1:])


def length_histogram(models: Mapping[str, Answers], bins: int) -> tuple[list[float], dict[str, list[int]]]:
    """Edges of equally wide bins from 0 to beyond the longest response, and each model's responses in them."""
    longest = max(int(answers.tokens_r.max(initial=0)) for answers in models.values())
    width = max(1, -(-(longest + 1) // bins))
    edges = np.arange(0, longest + 1 + width, width)
    return edges.astype(float).tolist(), {name: np.histogram(answers.tokens_r, edges)[0].tolist() for name, answers in models.items()}


def _draws(questions: int, resamples: int, seed: Sequence[int], responses: int) -> Iterator[Counts]:
    """How often each question is drawn, some draws at a time; first each question once. A few are not drawn again."""
    yield np.ones((1, questions), dtype=np.int64)
    rng, share = np.random.default_rng(seed), np.full(questions, 1 / questions)
    rows = max(1, CELLS // max(questions, responses))
    for start in range(0, resamples if questions >= FEWEST_QUESTIONS else 0, rows):
        yield rng.multinomial(questions, share, size=min(rows, resamples - start))


def _figures(answers: Answers, counts_dq: Counts) -> Drawn:
    samples_q = answers.samples_q
    mean_q = np.bincount(answers.question_r, answers.worth_r, len(samples_q)) / samples_q
    found = {"pass_rate": counts_dq @ mean_q / counts_dq.sum(axis=1), "median_tokens": _medians(answers, counts_dq)}
    return found | {name: _neg_logprob(answers, counts_dq, answers.responses(name)) for name in FIGURES[2:]}


def _medians(answers: Answers, counts_dq: Counts) -> Floats:
    order = np.argsort(answers.tokens_r, kind="stable")
    tokens_r = answers.tokens_r[order]
    upto_dr = np.cumsum(counts_dq[:, answers.question_r[order]], axis=1)
    total_d = upto_dr[:, -1:]
    lower_d, upper_d = ((upto_dr < rank_d).sum(axis=1) for rank_d in ((total_d + 1) // 2, total_d // 2 + 1))
    return (tokens_r[lower_d] + tokens_r[upper_d]) / 2


def _neg_logprob(answers: Answers, counts_dq: Counts, which_r: NDArray[np.bool_]) -> Floats:
    question_r, size = answers.question_r[which_r], len(answers.questions)
    nats_d = counts_dq @ np.bincount(question_r, -answers.logprob_r[which_r], size)
    tokens_d = counts_dq @ np.bincount(question_r, answers.tokens_r[which_r], size)
    return np.divide(nats_d, tokens_d, out=np.full(len(counts_dq), np.nan), where=tokens_d > 0)


def _interval(values_d: Floats) -> tuple[float | None, float | None]:
    known_d = values_d[np.isfinite(values_d)]
    if not len(known_d) or len(known_d) < (1 - MOST_UNDEFINED) * len(values_d):
        return None, None
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(known_d, [tail, 100 - tail])
    return float(low), float(high)
