"""Ends a rank whose Python no longer runs: compiled code that keeps the interpreter's lock for ever keeps the watchdog's threads as well.

`Guard` starts a process for it, python_guard.py RANK PID and the seconds of each word below: it reads words from its standard input, one byte each,
and where no word follows in the seconds of the last one it ends its rank by SIGKILL. Seconds in which either of the two did not run (stopped,
suspended, traced) do not count. It ends with its input, or with the rank. Nothing but the standard library, since it starts with every rank.
Owns: that process. Refuses nothing: where it cannot be started the run goes on without, and says so.
"""

import logging
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

IN_A_STEP, IN_A_LONG_PHASE, ENDING = b"s", b"l", b"e"
"""what a rank is about"""
WORDS = (IN_A_STEP, IN_A_LONG_PHASE, ENDING)
LOOK_SECONDS = 1.0
UNHEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
"""what a terminal or Slurm sends to all processes of a job is for the rank"""
OF_A_RANK = frozenset({"RANK", "LOCAL_RANK"})
"""variables by which ranks are told among processes: a guard is none"""
logger = logging.getLogger(__name__)


class Guard:
    """The rank's end of it. seconds: after each of WORDS, until the next one has to come."""

    def __init__(self, rank: int, seconds: tuple[float, float, float]) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        words = [sys.executable, "-I", "-S", str(Path(__file__)), str(rank), str(os.getpid()), *(f"{one:.1f}" for one in seconds)]
        env = {key: value for key, value in os.environ.items() if key not in OF_A_RANK}
        try:
            self._process = subprocess.Popen(words, env=env, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0)
        except OSError as error:
            logger.warning("rank %d has no guard (%s): compiled code that keeps Python's lock for ever would end nobody", rank, error)
            return
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)

    def tell(self, word: bytes) -> None:
        """Python runs, and is about this."""
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):  # it is gone, or was suspended for so long that its pipe is full
                self._process.stdin.write(word)

    def end(self) -> None:
        """The rank needs no guard any more."""
        if self._process is None:
            return
        process, self._process = self._process, None
        process.kill()
        process.wait()
        if process.stdin is not None:
            process.stdin.close()


def guard(rank: str, pid: int, seconds: dict[bytes, float]) -> None:
    """Until the rank is gone, or has to go."""
    allowed, waited = seconds[IN_A_LONG_PHASE], 0.0
    while os.getppid() == pid:
        looked = time.monotonic()
        if select.select([0], [], [], LOOK_SECONDS)[0]:
            words = os.read(0, 1 << 16)
            if not words:
                return
            allowed, waited = seconds[words[-1:]], 0.0
            continue
        pause = time.monotonic() - looked
        if pause < 2 * LOOK_SECONDS and not _is_stopped(pid):
            waited += pause
        if waited > allowed:
            os.kill(pid, signal.SIGKILL)  # before it is said: where the log lies on a disk that hangs, words take for ever
            with suppress(OSError):
                said = f"Python has not run for {waited:.0f} s, compiled code keeps its lock; it is ended"
                print(f"rank {rank} (process {pid}): {said}", file=sys.stderr)
            return


def _is_stopped(pid: int) -> bool:
    """By SIGSTOP, or by a debugger."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0] in ("T", "t")
    except (OSError, IndexError):
        return False


if __name__ == "__main__":
    for number in UNHEARD:
        signal.signal(number, signal.SIG_IGN)
    guard(sys.argv[1], int(sys.argv[2]), dict(zip(WORDS, map(float, sys.argv[3:]), strict=True)))
