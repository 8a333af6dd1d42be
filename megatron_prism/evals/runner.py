"""One model on one task: draws what is not on disk yet, grades it while the next responses are drawn, joins the ranks' parts.

Every response is on disk as soon as it is finished, and its verdict as soon as it is known, so that a process that is killed loses what was in
flight and draws nothing twice. Owns: the life of a response from request to finished file. Which responses there are is `responses`' knowledge, who
waits for whom `ranks`'. Called on every rank; rank 0 joins.
"""

import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_prism import artifact
from megatron_prism.errors import UserError
from megatron_prism.evals.frames import Record, RecordLog, write_all
from megatron_prism.evals.progress import Watch
from megatron_prism.evals.prompts import Asked
from megatron_prism.evals.ranks import Ranks
from megatron_prism.evals.responses import Pair, ResponseFolder, graded_as
from megatron_prism.evals.responses import asked as digest_of
from megatron_prism.generate.interface import Completion, Generator, Progress, Request
from megatron_prism.grading import Question, Verdict

Judge = Callable[[Sequence[tuple[Question, str]]], Iterable[Verdict]]
"""Verdicts on (question, text) pairs, in order."""
BATCH = 256
"""verdicts asked for at a time"""
AHEAD = 4 * BATCH
"""responses that wait to be graded at most"""
REGRADED, ALL_WRITTEN = "regraded", "ALL_WRITTEN"
"""folder of an output for verdicts that are not valid yet, and its file that makes them so"""
Ungraded = tuple[Question, int, str]
"""A question, the number of a sample, what it says"""


def pairs_of(questions: Sequence[Question], n: int) -> list[Pair]:
    """Every (question, sample), the order of the finished file."""
    return [(question.id, sample) for question in questions for sample in range(n)]


def draw(
    open_generator: Callable[[], Generator], folder: ResponseFolder, asked: Asked, ranks: Ranks, judge: Judge, watch: Watch | None = None
) -> None:
    """This rank's share of what is missing: responses onto the disk, graded beside. open_generator: called only where something is missing."""
    there = folder.answered()
    share = ranks.share(pairs_of(asked.questions, asked.sampling.n))
    missing = [pair for pair in share if pair not in there]
    advance = watch(folder.label, len(share), len(share) - len(missing)) if watch else None
    places = {question.id: place for place, question in enumerate(asked.questions)}
    requests = [Request(asked.prompts[places[question]], places[question], sample) for question, sample in missing]
    started = time.monotonic()
    with closing(folder.open_part("responses", ranks.rank)) as responses, Grading(judge, folder.open_part("verdicts", ranks.rank)) as grading:
        if requests:
            open_generator().generate_requests(requests, asked.sampling, _Keeper(asked.questions, responses, grading, advance))
        grading.finish()
    folder.end_share(ranks.rank, {"seconds": time.monotonic() - started, "grading_wait_seconds": grading.waited_seconds})


class _Keeper:
    """Called with each finished response: writes it down, sends it to be graded."""

    def __init__(self, questions: Sequence[Question], responses: RecordLog, grading: "Grading", advance: Progress | None):
        self.questions, self.responses, self.grading, self.advance = questions, responses, grading, advance
        self.before = time.monotonic()

    def __call__(self, request: Request, completion: Completion) -> None:
        question, now = self.questions[request.place], time.monotonic()
        record = {
            "id": question.id,
            "sample": request.sample,
            "asked": digest_of(question),
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "num_tokens": len(completion.tokens),
            "prompt_tokens_cut": completion.prompt_tokens_cut,
            "logprob": sum(completion.logprobs),
            "seconds": round(now - self.before, 6),
        }
        self.responses.append(record)
        self.grading.submit(question, request.sample, completion.text)
        self.before = time.monotonic()
        if self.advance is not None:
            self.advance(1)


class Grading:
    """Verdicts in a thread beside the generation; a context manager that closes its log. Its processes, if any, are the judge's.

    At most `ahead` responses wait; then whoever submits waits, so that a grader that cannot keep up fills no memory. On the way out with an error,
    what still waits stays ungraded: the next session grades it.
    """

    def __init__(self, judge: Judge, log: RecordLog, ahead: int = AHEAD):
        self._judge, self._log, self._ahead = judge, log, ahead
        self._waiting: deque[Ungraded] = deque()
        self._changed = threading.Condition()
        self._ended = self._dropped = False
        self._error: BaseException | None = None
        self.waited_seconds = 0.0
        """what the gradings added to the run"""
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> "Grading":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end(dropping=kind is not None)
        self._log.close()

    def submit(self, question: Question, sample: int, text: str) -> None:
        """Have a response graded. Errors: what stopped the grading of an earlier one (a full disk)."""
        begun = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) < self._ahead or self._error is not None)
            if self._error is not None:
                raise self._error
            self._waiting.append((question, sample, text))
            self._changed.notify_all()
        self.waited_seconds += time.monotonic() - begun

    def finish(self) -> None:
        """Wait until all are graded. Errors: what stopped the grading."""
        begun = time.monotonic()
        self._end(dropping=False)
        self.waited_seconds += time.monotonic() - begun
        if self._error is not None:
            raise self._error

    def _end(self, dropping: bool) -> None:
        with self._changed:
            self._ended, self._dropped = True, dropping
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        try:
            while batch := self._take():
                grade(batch, self._judge, self._log, lambda: self._dropped)
        except BaseException as error:  # a thread's boundary: whoever submits or waits is told
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _take(self) -> list[Ungraded]:
        """What waits, at least one; nothing at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ended)
            batch = [] if self._dropped else [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
            self._changed.notify_all()
        return batch


def grade(batch: Sequence[Ungraded], judge: Judge, log: RecordLog, is_dropped: Callable[[], bool] = lambda: False) -> None:
    """Write the verdicts on some responses; no more of them once they are dropped."""
    verdicts = timed(judge([(question, text) for question, _, text in batch]))
    for (question, sample, _), (decided, seconds) in zip(batch, verdicts, strict=True):
        if is_dropped():
            return
        log.append({"id": question.id, "sample": sample, **asdict(decided), "grading_seconds": seconds, "graded_as": graded_as(question)})


def join(folder: ResponseFolder, asked: Asked, ranks: Ranks, judge: Judge, facts: dict[str, Any]) -> None:
    """Rank 0: wait until every rank has done its share, grade what a killed one left, write the finished file."""
    pairs = pairs_of(asked.questions, asked.sampling.n)
    ranks.wait(f"task {folder.task}", lambda: _missing_ranks(folder, ranks, pairs))
    ended = [found for rank, found in folder.ended().items() if rank < ranks.world]
    with closing(folder.open_part("verdicts", ranks.rank)) as log:
        grade_missing(folder, asked.questions, pairs, judge, log)
    waited = max(found["grading_wait_seconds"] for found in ended)
    folder.join(pairs, {question.id: question for question in asked.questions}, {**facts, "grading_wait_seconds": waited})


def grade_missing(folder: ResponseFolder, questions: Sequence[Question], pairs: Sequence[Pair], judge: Judge, log: RecordLog) -> None:
    """Grade the responses among `pairs` that have no verdict yet."""
    by_id = {question.id: question for question in questions}
    graded = folder.verdicts(by_id)
    for batch in batched(folder.responses([pair for pair in pairs if pair not in graded]), BATCH):
        grade([(by_id[record["id"]], record["sample"], record["text"]) for record in batch], judge, log)


def regrade(output: Path, todo: Sequence[tuple[ResponseFolder, Sequence[Question]]], judge: Judge) -> None:
    """Grade the responses of finished files anew. All files are replaced, or none is: killed at any moment, no file has other graders' verdicts than
    the next. Errors: UserError for responses to questions that are no more."""
    settle_regrading(output)
    fresh = output / REGRADED
    for folder, questions in todo:
        by_id = {question.id: question for question in questions}
        write_all(fresh / folder.finished.relative_to(output), _judged(folder.read(), by_id, judge, folder.task))
    artifact.write_atomic(fresh / ALL_WRITTEN, "")
    settle_regrading(output)


def settle_regrading(output: Path) -> None:
    """After a regrading that may have been stopped: its files take their places where all of them were written, else they are dropped."""
    fresh = output / REGRADED
    if (fresh / ALL_WRITTEN).is_file():
        for file in fresh.rglob("*.jsonl.zst"):
            file.replace(output / file.relative_to(fresh))
    shutil.rmtree(fresh, ignore_errors=True)


def _judged(found: Iterator[Record], by_id: dict[str, Question], judge: Judge, task: str) -> Iterator[Record]:
    for batch in batched(found, BATCH):
        strange = [record["id"] for record in batch if record["id"] not in by_id]
        if strange:
            raise UserError(f"task {task} has no question {strange[0]!r} any more: its responses cannot be graded; evaluate into another output")
        for record, (decided, seconds) in zip(batch, timed(judge([(by_id[record["id"]], record["text"]) for record in batch])), strict=True):
            yield {**record, **asdict(decided), "grading_seconds": seconds, "graded_as": graded_as(by_id[record["id"]])}


def timed(verdicts: Iterable[Verdict]) -> Iterator[tuple[Verdict, float]]:
    """Each verdict with the seconds that it came after the one before it."""
    before = time.monotonic()
    for decided in verdicts:
        now = time.monotonic()
        yield decided, round(now - before, 6)
        before = now


def batched(found: Iterable[Record], size: int) -> Iterator[list[Record]]:
    """Lists of `size`, the last one perhaps shorter (itertools.batched, from Python 3.12 on)."""
    rest = iter(found)
    while batch := list(islice(rest, size)):
        yield batch


def _missing_ranks(folder: ResponseFolder, ranks: Ranks, pairs: Sequence[Pair]) -> list[int]:
    """Ranks whose share is not there. What an earlier session said of a share may be about fewer samples."""
    ended = folder.ended()
    missing = [rank for rank in range(ranks.world) if rank not in ended]
    if missing:
        return missing
    there = folder.answered()
    return sorted({number % ranks.world for number, pair in enumerate(pairs) if pair not in there})
