"""Many gradings at once, in worker processes of our own.

Owns: starting the workers, handing out pairs, giving the verdicts back in order, and what happens to a pair whose worker dies or takes too long: the
worker is replaced and the pair's reason is "timeout" or "grader_failed". Refuses: signals as time limits (SIGALRM works in main threads alone, and
there it is somebody else's), and forked workers (a fork of a process with threads or a GPU can hang).
"""

import atexit
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

import megatron_prism
from megatron_prism.errors import UserError
from megatron_prism.grading.extract import extract
from megatron_prism.grading.graders import check_question
from megatron_prism.grading.question import Question, Verdict
from megatron_prism.grading.sandbox import SandboxError
from megatron_prism.grading.sandbox.frames import EndedError, descriptors, hang_up, read_frame, readable, write_frame

START_SECONDS = 300.0
CPU_SECONDS = 15.0
"""For one answer that is no program. Processor time, so that a loaded machine gives the same verdicts."""
WALL_PER_CPU = 20.0
PROGRAM_WALL_SECONDS = 3600.0
"""For one program on all its tests: each has limits of its own in the sandbox, this ends what should be impossible."""
PAIRS_AHEAD = 64
"""Per worker: how far grading runs ahead of the first pair that is not done."""
PROGRAM_GRADERS = frozenset({"code_stdin", "code_function"})


class Worker:
    """One worker process, and the pair that it has."""

    def __init__(self) -> None:
        folder = str(Path(megatron_prism.__file__).parents[1])
        paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, *([] if folder in paths else [folder])]), "OMP_NUM_THREADS": "1"}
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "megatron_prism.grading.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            env=environment,
            start_new_session=True,  # a launcher's signal to our group is for us to obey once the pairs are graded; workers end with their input
        )
        self.inbox, self.outbox = descriptors(self.process)
        self.ready = False
        self.index: int | None = None
        self.seconds = self.deadline = 0.0

    def wait_until_ready(self) -> None:
        """Errors: SandboxError where the worker cannot start: then no pair is at fault."""
        if self.ready:
            return
        try:
            read_frame(self.outbox, START_SECONDS)
        except (EndedError, OSError) as error:
            said = self.last_words()
            self.kill()
            raise SandboxError(f"a grading worker did not start ({error}): {said}") from error
        self.ready = True
        self.deadline = time.monotonic() + self.seconds

    def give(self, index: int, question: Question, text: str) -> None:
        """Hand over a pair. Errors: OSError where the worker has died; SandboxError where it never started."""
        is_program = question.grader in PROGRAM_GRADERS
        self.index = index
        self.seconds = PROGRAM_WALL_SECONDS if is_program else WALL_PER_CPU * CPU_SECONDS
        self.deadline = time.monotonic() + self.seconds
        try:
            write_frame(self.inbox, {"cpu_seconds": None if is_program else CPU_SECONDS}, pickle.dumps((question, text)))
        except OSError:
            self.wait_until_ready()
            raise

    def take(self) -> Verdict:
        """The verdict on its pair; this waits until the deadline at most. Errors: EndedError, OSError; UserError as `verdict`'s."""
        reply, _ = read_frame(self.outbox, max(0.0, self.deadline - time.monotonic()))
        self.index = None
        if "user_error" in reply:
            raise UserError(reply["user_error"])
        return Verdict(**reply)

    def last_words(self) -> str:
        self.stderr.seek(0)
        lines = self.stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else "it said nothing"

    def kill(self) -> int:
        """End it and what it started; returns how it ended (negative: by which signal)."""
        self.process.kill()
        hang_up(self.process)
        code = self.process.wait()
        self.stderr.close()
        return code


class Pool:
    """num_workers: worker processes; they start with the first pair and end with the context. Threads may share a pool: they take turns."""

    def __init__(self, num_workers: int | None = None) -> None:
        self.num_workers = num_workers or len(os.sched_getaffinity(0))
        self._workers: list[Worker] = []
        self._lock = threading.Lock()

    def verdicts(self, pairs: Iterable[tuple[Question, str]]) -> Generator[Verdict, None, None]:
        """The verdict on each (question, text), in order; it reads ahead in `pairs`. Errors: UserError, see `check_question`; SandboxError."""
        with self._lock:
            try:
                yield from self._graded(iter(pairs))
            finally:
                for worker in [worker for worker in self._workers if worker.index is not None]:
                    self._discard(worker)

    def _graded(self, pairs: Iterator[tuple[Question, str]]) -> Iterator[Verdict]:
        done: dict[int, Verdict] = {}
        answers: dict[int, str | None] = {}
        num_read = num_given = 0
        exhausted = False
        while True:
            while not exhausted and num_read - num_given < PAIRS_AHEAD * self.num_workers and (worker := self._free_worker()) is not None:
                pair = next(pairs, None)
                if pair is None:
                    exhausted = True
                    break
                check_question(pair[0])
                answers[num_read] = extract(pair[0].extraction, pair[1])
                if answers[num_read] is None:
                    done[num_read] = Verdict(False, 0.0, "no_answer")
                else:
                    self._give(worker, num_read, *pair)
                num_read += 1
            while num_given in done:
                yield done.pop(num_given)
                answers.pop(num_given)
                num_given += 1
            if exhausted and num_given == num_read:
                return
            for index, verdict in self._finished(answers):
                done[index] = verdict

    def _give(self, worker: Worker, index: int, question: Question, text: str) -> None:
        try:
            worker.give(index, question, text)
        except OSError:  # it died while it had nothing to do, which is not this pair's fault
            self._discard(worker)
            replacement = Worker()
            self._workers.append(replacement)
            self._give(replacement, index, question, text)

    def _free_worker(self) -> Worker | None:
        for worker in self._workers:
            if worker.index is None:
                return worker
        if len(self._workers) < self.num_workers:
            worker = Worker()
            self._workers.append(worker)
            return worker
        return None

    def _finished(self, answers: dict[int, str | None]) -> Iterator[tuple[int, Verdict]]:
        """Wait until a worker has something to say or is late."""
        busy = {worker.outbox: worker for worker in self._workers if worker.index is not None}
        if not busy:
            return
        for worker in busy.values():
            worker.wait_until_ready()
        ready = readable(busy, min(worker.deadline for worker in busy.values()) - time.monotonic())
        late = [descriptor for descriptor, worker in busy.items() if worker.deadline <= time.monotonic()]
        for descriptor in dict.fromkeys([*ready, *late]):
            worker = busy[descriptor]
            index = worker.index
            assert index is not None
            try:
                yield index, worker.take()
            except (EndedError, OSError) as error:
                yield index, self._lost(worker, answers[index], error)

    def _lost(self, worker: Worker, answer: str | None, error: Exception) -> Verdict:
        said = worker.last_words()
        code = self._discard(worker)
        if isinstance(error, EndedError) and error.late:
            return Verdict(False, 0.0, "timeout", answer, "the grader said nothing in time")
        if code == -signal.SIGXCPU:
            return Verdict(False, 0.0, "timeout", answer, f"the grader was not done after {CPU_SECONDS:.0f} s on a processor")
        return Verdict(False, 0.0, "grader_failed", answer, f"the grading process ended with {code}: {said}")

    def _discard(self, worker: Worker) -> int:
        self._workers.remove(worker)
        return worker.kill()

    def close(self) -> None:
        """End the workers."""
        while self._workers:
            self._discard(self._workers[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def shared_pool() -> Pool:
    """One worker for the verdicts of this process that are asked for one by one."""
    return _shared_pool(os.getpid())


@cache
def _shared_pool(_process: int) -> Pool:
    pool = Pool(1)
    atexit.register(pool.close)
    return pool
