"""A process whose output goes to our terminal and into a log file at once, and that does not outlive us."""

import contextlib
import ctypes
import fcntl
import logging
import os
import pty
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

logger = logging.getLogger(__name__)

KEPT_BYTES = 1 << 16
SECONDS_TO_END = 30.0
PR_SET_PDEATHSIG = 1


class Child:
    """A running process. As a context manager it is ended, with all its descendants, when the block is left early."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], pass_fds: Sequence[int] = ()) -> None:
        """Start it. Where we write to a terminal it gets one too (progress bars stay alive); else a pipe."""
        self._output, theirs = _terminal() if sys.stdout.isatty() else os.pipe()
        self._open = True
        self.process = subprocess.Popen(
            list(argv), env=dict(env), stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, pass_fds=pass_fds, preexec_fn=_die_with_parent
        )
        os.close(theirs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.end()
        os.close(self._output)

    def copy_output(self, log: Path, title: str, until: int | None = None) -> str:
        """Copy output until the process ends, or until the descriptor `until` has something to read; the last 64 KiB are returned."""
        kept = b""
        with contextlib.closing(_Log(log)) as file:
            file.write(f"\n=== {datetime.now().astimezone():%Y-%m-%d %H:%M:%S}  {title}\n".encode())
            while True:
                chunk = self._read(until)
                if chunk is None:
                    return kept.decode(errors="replace")
                file.write(chunk)
                sys.stdout.buffer.write(chunk)
                sys.stdout.flush()
                kept = (kept + chunk)[-KEPT_BYTES:]

    def wait(self) -> int:
        """The process's returncode, once it has ended."""
        return self.process.wait()

    def end(self) -> None:
        """SIGTERM, so that torchrun ends its ranks, then SIGKILL for what is left of it and its descendants."""
        import psutil

        try:
            family = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            family = []
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(SECONDS_TO_END)
        self.process.kill()
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=SECONDS_TO_END)
        self.process.wait()

    def _read(self, until: int | None) -> bytes | None:
        """The next piece of output; None at the end. What was written before the end comes first."""
        while True:
            watched = [self._output] if self._open else []
            ready = readable(watched + ([] if until is None else [until]), 0.2)
            if self._output in ready:
                chunk = self._read_ready()
                if chunk:
                    return chunk
                self._open = False
            elif ready or self.process.poll() is not None:
                return None

    def _read_ready(self) -> bytes:
        try:
            return os.read(self._output, 1 << 16)
        except OSError:  # a terminal whose last writer has gone answers EIO, not an empty read
            return b""


class _Log:
    """A file that output is appended to at once. Where it cannot be written (a full disk) the work goes on, and its output to the terminal alone."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, None
        with self._trying():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)

    def write(self, chunk: bytes) -> None:
        """Append."""
        with self._trying():
            while chunk and self._file is not None:
                chunk = chunk[self._file.write(chunk) :]

    def close(self) -> None:
        """Done."""
        if self._file is not None:
            self._file.close()

    @contextlib.contextmanager
    def _trying(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            logger.warning("%s cannot be written (%s): the output goes on to the terminal alone", self._path, error.strerror)
            self.close()
            self._file = None


def readable(waiting: Iterable[int], seconds: float) -> list[int]:
    """Which of the descriptors can be read, or have ended; after `seconds` none. Unlike select(2) it takes those beyond 1,023 too."""
    with selectors.DefaultSelector() as selector:
        for descriptor in waiting:
            selector.register(descriptor, selectors.EVENT_READ)
        return [key.fd for key, _ in selector.select(seconds)]


def _terminal() -> tuple[int, int]:
    ours, theirs = pty.openpty()
    size = shutil.get_terminal_size()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", size.lines, size.columns, 0, 0))
    settings = termios.tcgetattr(theirs)
    settings[1] &= ~termios.OPOST  # our own terminal turns \n into \r\n already; the log wants plain lines
    termios.tcsetattr(theirs, termios.TCSANOW, settings)
    return ours, theirs


def _die_with_parent() -> None:
    """In the child: SIGTERM when the process that started it is gone, however it went."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
