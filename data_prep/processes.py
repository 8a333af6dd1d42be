"""The processes that work for one: spawned, of one thread each, ended with the one that began them.

One thread, because malloc then takes no locks, and tokenizing is malloc by two fifths: a second one, though it only waits, costs a seventeenth.
For the same reason they have the faster malloc, where there is one (`allocator`).
Owns: beginning them, in the parent and in each. Refuses nothing.
"""

import fcntl
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import wait
from threading import Lock
from typing import TypeVar

from megatron_prism.data_prep import allocator
from megatron_prism.data_prep.tokenizer import limit_threads

State = TypeVar("State")
BLAS_THREADS = "OPENBLAS_NUM_THREADS"
"""numpy begins these when it is imported, before a worker could say that it wants none."""


@contextmanager
def pool(workers: int, start: Callable[[State], None], state: State) -> Iterator[ProcessPoolExecutor]:
    """So many processes, in each of which `start(state)` runs first, and calls `begin`."""
    # spawn: a forked copy of a process with threads (tokenizers, arrow, torch) can hang
    with _environment_of_workers(), ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start, (state,)) as executor:
        yield executor


_pools = Lock()
_open = 0
_before: dict[str, str | None] = {}
"""what the variables were before the first of the open pools; they may end in any order, and the last to end sets these again"""


@contextmanager
def _environment_of_workers() -> Iterator[None]:
    """Variables that a process must begin with, in this one's environment until the last pool ends."""
    global _open
    with _pools:
        _open += 1
        if _open == 1:
            given = {BLAS_THREADS: "1", **allocator.environment()}
            _before.update({name: os.environ.get(name) for name in given})
            os.environ.update(given)
    try:
        yield
    finally:
        with _pools:
            _open -= 1
            if not _open:
                for name in _before:
                    os.environ.pop(name, None)
                os.environ.update({name: value for name, value in _before.items() if value is not None})
                _before.clear()


def begin() -> None:
    """Make this process a worker: called once in each, before any work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which stops the pool
    _end_with_parent()
    limit_threads()
    allocator.keep_memory()


def _end_with_parent() -> None:
    """Without this a worker would wait for work for ever after its parent is killed: the workers hold each other's pipe open. When the parent's end
    of the sentinel closes, the system sends SIGIO, which ends a process, though the parent ignored or blocked it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    # Linux ends a process by default, at once; BSD and macOS (not tested there) ignore the signal by default
    signal.signal(signal.SIGIO, signal.SIG_DFL if sys.platform == "linux" else lambda number, frame: os._exit(1))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGIO})
    fcntl.fcntl(parent.sentinel, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(parent.sentinel, fcntl.F_SETFL, fcntl.fcntl(parent.sentinel, fcntl.F_GETFL) | fcntl.FASYNC)
    if wait([parent.sentinel], 0):  # it had ended before
        os._exit(1)
