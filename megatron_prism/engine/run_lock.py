"""One process at a time works on a run's folder: two would delete each other's half-written checkpoints and mix their metrics.

The lock is the kernel's (flock on OUTPUT/.running.tmp), so that a killed run leaves none. Called on every rank. Refuses: a second run. Where the
file system has no locks the run goes on without, and says so.
"""

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_prism.errors import UserError

logger = logging.getLogger(__name__)
FILE = ".running.tmp"
"""no part of an artifact by its ending"""


@contextmanager
def held(output: Path) -> Iterator[None]:
    """Inside, the folder is this run's; rank 0 holds it for all. Errors: UserError where another process has it."""
    if os.environ.get("RANK", "0") != "0" or (output.exists() and not output.is_dir()):  # `artifact.begin` says what is wrong with a file
        yield
        return
    output.mkdir(parents=True, exist_ok=True)
    path = output / FILE
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                file.seek(0)
                who = file.read().strip() or "another process"
                file.close()
                raise UserError(f"{output} is being written by {who}: wait for its end, or choose another output (output=...)") from None
            logger.warning("%s cannot be locked (%s): see to it that one run at a time is started in this folder", path, error.strerror)
            break
        if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            break
        file.close()  # whoever had it has just removed it
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # nothing was begun in it
                output.rmdir()
