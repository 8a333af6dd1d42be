"""A run that hangs is ended, and says which rank was behind, and where.

Each rank tells what it is about (`beat`, `long_phase`), and a thread of its own looks whether that moves on. Nothing is exchanged while all is well:
the first rank that finds itself late leaves a call in OUTPUT/watchdog, each rank's thread answers with what it is about, where its main thread
stands, the stacks of all its threads and torch's record of its last collectives, and one of them writes who was behind (`hang_report`). A rank that
does not answer is stopped, dead, or holds Python's lock in compiled code. Then all end with status 1. Files need no process group that works; and
where their disk does not answer, the one that stands still may be all that there is to see, and the rank ends nevertheless. So does one whose
compiled code keeps Python's lock, and with it this thread: a process beside it sees to that (`python_guard`).
Owns: OUTPUT/watchdog, and when to end. Refuses nothing: without a timeout it does not look.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from megatron_prism.artifact import write_atomic
from megatron_prism.engine import hang_report
from megatron_prism.engine.hang_report import Answer
from megatron_prism.engine.python_guard import ENDING, IN_A_LONG_PHASE, IN_A_STEP, Guard
from megatron_prism.engine.ranks import on_main
from megatron_prism.engine.watchdog_settings import WatchdogSection

FOLDER = "watchdog"
CALL = "call_"
"""begins the name of a session's call: what is left of an earlier one, which NFS may still show, calls nobody"""
STATUS = 1
MOST_SECONDS_BETWEEN_LOOKS = 5.0
FLIGHT_SECONDS = 5.0
"""how long to wait for torch's record of collectives, whose writing may hang with what it records"""
DISK_SECONDS = 5.0
"""how long the disk may take beside"""
STDERR = 2
"""the process's own: what stands in sys.stderr may have no descriptor (a notebook's)"""
GUARD_SECONDS = 5.0
"""how much later than this thread would, and faulthandler has, a guard ends a rank whose Python does not run"""
MINUTES_TO_END = 5
"""within so many a rank that is late has ended: process groups that give up before would hide who was behind"""


@dataclass(frozen=True)
class Beat:
    """What this rank is about since when, by time.monotonic; number: beats before it; is_long: whether it may take long."""

    phase: str = "start"
    since: float = 0.0
    number: int = 0
    is_long: bool = False
    is_last: bool = False
    """the run is ending: ranks beside this one may have ended already"""


_now = Beat()
_depth = 0
"""how many long phases this rank is in"""
_is_ending = False


def beat(phase: str) -> None:
    """This rank makes progress, and is about this from now on."""
    global _now
    _now = Beat(phase, time.monotonic(), _now.number + 1, _depth > 0, _is_ending)


@contextmanager
def long_phase(phase: str) -> Iterator[None]:
    """What is done inside may take long, and shows no progress of its own."""
    global _depth
    _depth += 1
    beat(phase)
    try:
        yield
    finally:
        _depth -= 1
        beat(f"after {phase}")


@contextmanager
def last_phase(phase: str) -> Iterator[None]:
    """A long phase in which the run ends, well or badly: that a rank beside this one is gone is no fault then."""
    global _is_ending
    _is_ending = True
    try:
        with long_phase(phase):
            yield
    finally:
        _is_ending = False


def record_flights(output: Path) -> None:
    """Have torch record its last collectives, on NCCL with a dump into OUTPUT/watchdog when one times out. Before the process groups start."""
    prefix = str((output / FOLDER / "flight_").absolute())
    wanted = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_FR_DUMP_TEMP_FILE": prefix, "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


@contextmanager
def watching(output: Path, section: WatchdogSection | None, step: Callable[[], int]) -> Iterator[None]:
    """Inside, this rank is looked after. step: those that are done. Called on every rank at once; files of an earlier hang are kept, numbered."""
    call = on_main(lambda: make_room(output))
    if section is None:
        yield
        return
    beat("the first step")
    watchdog = Watchdog(output / FOLDER, section, step, call)
    watchdog.begin()
    try:
        yield
    finally:
        watchdog.stop()


def make_room(output: Path) -> str:
    """Rank 0: an empty folder, where torch can write its record too; files of an earlier hang are kept, numbered. The name of this start's call."""
    folder = output / FOLDER
    if folder.exists() and any(folder.iterdir()):
        number = next(number for number in range(1, 10_000) if not folder.with_name(f"{FOLDER}_{number:03d}").exists())
        folder.rename(folder.with_name(f"{FOLDER}_{number:03d}"))
    folder.mkdir(exist_ok=True)
    return CALL + uuid.uuid4().hex[:8]


class Watchdog(threading.Thread):
    """The thread that looks after one rank."""

    def __init__(self, folder: Path, section: WatchdogSection, step: Callable[[], int], call: str) -> None:
        super().__init__(name="watchdog", daemon=True)
        import torch.distributed as dist

        self.folder, self.step, self.call = folder, step, call
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.seconds, self.long_seconds = 60 * section.timeout_minutes, 60 * section.long_timeout_minutes
        self.interval = min(MOST_SECONDS_BETWEEN_LOOKS, self.seconds / 10)
        self.patience = min(60.0, max(3.0, self.seconds / 4))
        """how long to wait for the answers of the others"""
        self.first_step = step()
        self.answer_seconds = 2 * self.patience + FLIGHT_SECONDS + DISK_SECONDS
        until = (self.seconds + self.patience, self.long_seconds + self.patience, self.answer_seconds)
        self.guard = Guard(self.rank, (until[0] + GUARD_SECONDS, until[1] + GUARD_SECONDS, until[2] + GUARD_SECONDS))
        self.launcher = os.getppid() if "RANK" in os.environ else None
        self.beside = _ranks_beside()
        self._seen = Beat()
        self._lost = 0.0
        """seconds of this beat in which this process itself did not run"""
        self._ended, self._called = threading.Event(), threading.Event()

    def begin(self) -> None:
        """Look from now on."""
        self._see_to_the_lock(is_long=True)
        self.start()

    def stop(self) -> None:
        """Look no longer."""
        self._ended.set()
        self.join()
        self.guard.end()

    def run(self) -> None:
        """Look, until the run is over."""
        threading.Thread(target=self._listen, name="watchdog's ear", daemon=True).start()
        looked = time.monotonic()
        while not self._ended.wait(self.interval):
            now = time.monotonic()
            try:
                self._look(pause=now - looked - self.interval)
            except Exception as error:  # without this thread nobody would look, and the guard would take the rank for one that hangs
                self.guard.tell(IN_A_LONG_PHASE)
                _say(f"rank {self.rank}: the watchdog could not look: {error!r}")
            looked = now
        faulthandler.cancel_dump_traceback_later()

    def _listen(self) -> None:
        """Whether a rank has called. A thread of its own: a disk that does not answer keeps it, and not the one that looks."""
        while not self._ended.wait(self.interval):
            if self.call in _names(self.folder):
                self._called.set()

    def _look(self, pause: float) -> None:
        seen = _now
        self._lost = 0.0 if seen.number != self._seen.number else self._lost + (pause if pause > self.interval + 1 else 0.0)
        self._seen = seen
        is_long = seen.is_long or self.step() == self.first_step
        may_take = self.long_seconds if is_long else self.seconds
        late = time.monotonic() - seen.since - self._lost > may_take
        if late or self._called.is_set():
            self._answer_and_end(seen, late)
        gone = self._missed(seen)
        if gone is not None:
            _say(f"rank {self.rank}: {gone}; so this rank ends")
            os._exit(STATUS)
        self._see_to_the_lock(is_long)

    def _see_to_the_lock(self, is_long: bool) -> None:
        """Where compiled code keeps Python's lock this thread stands still; faulthandler's does not: it shows the stacks, then the guard ends all."""
        faulthandler.dump_traceback_later((self.long_seconds if is_long else self.seconds) + self.patience, file=STDERR)
        self.guard.tell(IN_A_LONG_PHASE if is_long else IN_A_STEP)

    def _missed(self, seen: Beat) -> str | None:
        """Who is no longer there without whom this rank can only hang: the process that started it, or a rank beside it."""
        if self.launcher is not None and os.getppid() != self.launcher:
            return "the process that started it is gone"
        dead = [] if seen.is_last else [pid for pid in self.beside if not _is_there(pid)]
        return f"a rank beside it has ended (process {dead[0]})" if dead else None

    def _answer_and_end(self, seen: Beat, late: bool) -> None:
        """Whatever happens while it answers, the end comes."""
        try:
            faulthandler.cancel_dump_traceback_later()
            self.guard.tell(ENDING)
            telling = threading.Thread(target=self._tell, args=(seen, late), daemon=True)
            telling.start()
            telling.join(self.answer_seconds)
            if telling.is_alive():
                place = hang_report.place(sys._current_frames()[threading.main_thread().ident or 0])
                said = f"no progress ({seen.phase}, step {self.step() + 1}; is at {place}), and {self.folder} does not answer; it ends"
                saying = threading.Thread(target=_say, args=(f"rank {self.rank}: {said}",), daemon=True)  # the log may lie on the same disk
                saying.start()
                saying.join(DISK_SECONDS)
            self._end_the_stopped()
        finally:
            os._exit(STATUS)

    def _tell(self, seen: Beat, late: bool) -> None:
        with suppress(OSError):
            if late:
                (self.folder / self.call).touch()
            self._answer(seen, late)
        answers = self._others()
        if self.rank == min(answers, default=self.rank) and answers:
            found = hang_report.judge(answers, self.ranks)
            _say(found.text(self.folder))
            with suppress(OSError):  # a disk that fails may be what all wait for
                write_atomic(self.folder / hang_report.TEXT, found.text(self.folder) + "\n")
                write_atomic(self.folder / hang_report.RECORD, json.dumps(found.record(), indent=1) + "\n")
        else:
            _wait(lambda: hang_report.RECORD in _names(self.folder), self.patience)

    def _answer(self, seen: Beat, late: bool) -> None:
        """OUTPUT/watchdog/rank_N.txt, flight_N and then rank_N.json."""
        main = sys._current_frames()[threading.main_thread().ident or 0]
        flights = _flights(self.folder / f"flight_{self.rank}")
        answer = Answer(
            rank=self.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            step=self.step() + 1,
            phase=seen.phase,
            number=seen.number,
            seconds=round(time.monotonic() - seen.since, 1),
            late=late,
            place=hang_report.place(main),
            waits_in=hang_report.collective(main),
            collectives=flights,
        )
        with (self.folder / f"rank_{self.rank}.txt").open("w", encoding="utf-8") as file:
            file.write(f"{answer.line()}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        write_atomic(self.folder / f"rank_{self.rank}.json", json.dumps(asdict(answer)) + "\n")

    def _others(self) -> dict[int, Answer]:
        """The answers of all ranks; of those that come in time."""
        files = {rank: f"rank_{rank}.json" for rank in range(self.ranks)}
        _wait(lambda: _names(self.folder).issuperset(files.values()), self.patience)
        there = _names(self.folder)
        return {rank: Answer(**json.loads((self.folder / name).read_text(encoding="utf-8"))) for rank, name in files.items() if name in there}

    def _end_the_stopped(self) -> None:
        """A rank that was stopped (SIGSTOP) hears nothing but SIGKILL, and its launcher would wait for it."""
        for pid in self.beside:
            with suppress(psutil.Error, OSError):
                process = psutil.Process(pid)
                if process.status() == psutil.STATUS_STOPPED:
                    process.send_signal(signal.SIGKILL)


def _ranks_beside() -> list[int]:
    """The processes of the other ranks of this machine; none where torchrun did not start them."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return []
    own = psutil.Process()
    with suppress(psutil.Error):
        beside = psutil.Process(own.ppid()).children()
        return [process.pid for process in beside if process.pid != own.pid and process.cmdline() == own.cmdline()]
    return []


def _is_there(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _flights(path: Path) -> dict[str, dict[str, str]]:
    """torch's record of this rank's collectives: to a file, for torch's own fr_trace, and the last of each group; empty where there is none."""
    found: dict[str, dict[str, str]] = {}

    def ask() -> None:
        import torch

        c10d: Any = torch._C._distributed_c10d

        with suppress(Exception):  # of use where it is, and no reason to end otherwise
            # a torch for CUDA has both; gloo's collectives are in the second alone
            kinds = ("nccl", "fr") if torch.distributed.get_backend() == "nccl" else ("fr", "nccl")
            path.write_bytes(_first(c10d, *(f"_dump_{kind}_trace" for kind in kinds))())
            text: Any = _first(c10d, *(f"_dump_{kind}_trace_json" for kind in kinds))()
            found.update(json.loads(text).get("pg_status", {}))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(FLIGHT_SECONDS)
    return dict(found)


def _first(module: Any, *names: str) -> Any:
    return next(getattr(module, name) for name in names if hasattr(module, name))


def _names(folder: Path) -> set[str]:
    """What lies there; nothing where the disk fails. Listed: NFS may say for a minute that a name is absent, but opening a folder asks the server."""
    with suppress(OSError):
        return set(os.listdir(folder))  # noqa: PTH208 (names are what is asked for)
    return set()


def _say(text: str) -> None:
    """To people, if they still listen: the launcher that read our output may be gone."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.2)
