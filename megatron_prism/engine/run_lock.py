"""One process at a time works on a run's folder: two would delete each other's half-written checkpoints and mix their metrics.

The lock is the kernel's (flock on OUTPUT/.running.tmp), so that a killed run leaves none, on a disk of this machine at once; on a network's file
system the server keeps a lost machine's lock for a while, or until that machine returns. So a folder that is taken is waited for. Called on every
rank. Refuses: a second run beside one that is seen to live. Where the file system has no locks the run goes on without, and says so.
"""

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from megatron_prism.errors import MachineError, UserError

logger = logging.getLogger(__name__)
FILE = ".running.tmp"
"""no part of an artifact by its ending"""
WAIT_SECONDS = 300.0
"""NFSv4 forgets a client after its lease of 90 s, and a server that was started again gives its clients as long to come back"""
LOOK_SECONDS = 1.0
TAKEN = (errno.EAGAIN, errno.EACCES)
LOCKLESS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""what a file system without locks answers; anything else (ESTALE, EIO) is a failure of the moment"""
BOOT = Path("/proc/sys/kernel/random/boot_id")
_held: set[Path] = set()


@contextmanager
def held(output: Path) -> Iterator[None]:
    """Inside, the folder is this run's; rank 0 holds it for all, and waits for it. Errors: UserError where a process that lives here has it still;
    MachineError where one has it of which nobody knows whether it lives."""
    if os.environ.get("RANK", "0") != "0" or (output.exists() and not output.is_dir()):  # `artifact.begin` says what is wrong with a file
        yield
        return
    with _taken(output) as file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n{_life(os.getpid())}")
        file.flush()
        try:
            yield
        finally:
            _held.discard(output.resolve())
            if _is_named(file, output / FILE):  # else somebody has removed it, and another run may have made its own
                (output / FILE).unlink(missing_ok=True)
            with suppress(OSError):  # nothing was begun in it
                output.rmdir()


def is_held(output: Path) -> bool:
    """Whether this process has the folder for itself: what lies half-written in it is nobody's. False where the file system has no locks."""
    return output.resolve() in _held


def _taken(output: Path) -> IO[str]:
    """The file, locked, in a folder that is made where it is not there; where it cannot be locked, as it is. Errors: as `held`'s."""
    path, end = output / FILE, None
    while True:
        file = _opened(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in LOCKLESS:
                logger.warning("%s cannot be locked (%s): see to it that one run at a time is started in this folder", path, error.strerror)
                return file
            refusal, why = _unlocked(file, output, error)
            if end is None:
                end = time.monotonic() + WAIT_SECONDS
                logger.warning("%s: waiting up to %g s", why, WAIT_SECONDS)
            elif time.monotonic() >= end:
                raise refusal from None
            time.sleep(min(LOOK_SECONDS, WAIT_SECONDS))
            continue
        if _is_named(file, path):
            _held.add(output.resolve())
            return file
        file.close()  # whoever had it has just removed it


def _unlocked(file: IO[str], output: Path, error: OSError) -> tuple[UserError, str]:
    """What to say where the lock was not given: at the end of the waiting, and at its beginning. The file is closed."""
    if error.errno not in TAKEN:
        with suppress(OSError):
            file.close()
        why = f"{output / FILE} cannot be locked ({error.strerror})"
        return MachineError(f"{why}, after {WAIT_SECONDS:g} s still: see to its file system, then start the same command again"), why
    file.seek(0)
    who, _, life = file.read().partition("\n")
    file.close()
    return _refusal(output, who, life), f"{output} is being written by {who or 'another process'}"


def _opened(path: Path) -> IO[str]:
    """The file, in a folder that is made where it is not there: whoever had it and began nothing removes that at any moment."""
    while True:
        try:
            return path.open("a+", encoding="utf-8")
        except FileNotFoundError:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except FileExistsError as error:  # removed while mkdir asked what it is; else a link that leads nowhere
                if os.path.lexists(error.filename) and not Path(error.filename).is_dir():
                    raise


def _is_named(file: IO[str], path: Path) -> bool:
    """Whether the open file is the one of this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except (FileNotFoundError, NotADirectoryError):  # asked in one go: it may be removed at any moment
        return False


def _refusal(output: Path, who: str, life: str) -> UserError:
    """Who has the folder, and what to do: a process that is seen to live on this machine is another run; any other may be gone already."""
    words = who.split()
    if words[:1] == ["process"] and words[1].isdecimal() and life and life == _life(int(words[1])):
        return UserError(f"{output} is being written by {who}, which lives: wait for its end, or choose another output (output=...)")
    return MachineError(
        f"{output} is being written by {who or 'another process'}, after {WAIT_SECONDS:g} s still. If that run lives, wait for its end, or choose "
        "another output (output=...). If its machine was lost, the file server gives the lock back in a while, or when that machine returns: start "
        f"the same command again; where you know that no run is alive there, remove {output / FILE} before"
    )


def _life(process: int) -> str:
    """What tells a process of this machine from all others: which start of the machine, and when in it the process began; "" for one not seen."""
    try:
        return f"{BOOT.read_text().strip()} {Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return ""
