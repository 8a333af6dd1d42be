"""What asks a run to stop: SIGTERM, SIGUSR1 and SIGUSR2, heard by any rank; and a second SIGTERM, which ends the process at once.

The first is heard between two lines of Python, so a rank that waits in a collective hears it when that returns. The second is for a run that hangs,
so it is counted by a thread, which the signal reaches at any moment. Owns: the process's handlers while a run takes steps.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
SECONDS_BETWEEN = 2.0
"""Two SIGTERMs within so long are one: Slurm sends one to each process of a step, and torchrun hands its own on."""
END = b"\0"
_hearing = False


@contextmanager
def heard(stop: Callable[[], None]) -> Iterator[None]:
    """Inside, each of these signals calls `stop`, in the main thread. A process forked from here has the usual handlers."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    counting = threading.Thread(target=_end_at_the_second, args=(read_end,), name="second SIGTERM", daemon=True)
    counting.start()
    global _hearing
    previous = {sign: signal.signal(sign, lambda *_: stop()) for sign in STOP_SIGNALS}
    wakeup = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    _hearing = True
    try:
        yield
    finally:
        _hearing = False
        signal.set_wakeup_fd(wakeup)
        for sign, handler in previous.items():
            signal.signal(sign, handler)
        os.write(write_end, END)
        counting.join()
        os.close(read_end)
        os.close(write_end)


def _end_at_the_second(pipe: int) -> None:
    """Read the numbers of signals as they come."""
    first: float | None = None
    while (number := os.read(pipe, 1)) != END:
        if number[0] != signal.SIGTERM:
            continue
        now = time.monotonic()
        if first is None:
            first = now
        elif now - first > SECONDS_BETWEEN:
            os._exit(128 + signal.SIGTERM)


def _forget() -> None:
    """In a process forked meanwhile: its signals are its own, and whoever ends it must find it mortal."""
    if _hearing:
        signal.set_wakeup_fd(-1)
        for sign in STOP_SIGNALS:
            signal.signal(sign, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget)
