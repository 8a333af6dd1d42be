"""Temporary folders that are locked while their owner lives, so that the next owner can clear away what one that was killed left behind.

A lock on the folder itself: the kernel drops it with the process, kill -9 or not, and it holds between containers that share a disk, where a
process id says nothing. Refuses: to touch folders that are locked, another user's, links, or kept on purpose. Standard library alone.
"""

import fcntl
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

KEPT = ".kept"


class TemporaryFolder:
    """`prism-KIND-...` in `parent` (None: where temporary files go). Leaving its `with` removes it."""

    def __init__(self, kind: str, parent: Path | None = None):
        parent = parent or Path(tempfile.gettempdir())
        _clear_once(kind, parent)
        new = Path(tempfile.mkdtemp(prefix=f".prism-{kind}-", dir=parent))
        self._lock = _locked(new)
        self.path = new.rename(new.with_name(new.name.removeprefix(".")))  # it is locked before anybody looks for it

    def remove(self) -> None:
        """It and all that is in it; a second call does nothing."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._unlock()

    def keep(self) -> None:
        """Leave it to people."""
        (self.path / KEPT).touch()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()


def clear(kind: str, parent: Path) -> None:
    """Remove the folders of this kind whose owners are dead."""
    for folder in parent.glob(f"prism-{kind}-*"):
        try:
            lock = _locked(folder)
        except OSError:  # a link, another user's, or gone by now
            continue
        if lock is not None:
            if not (folder / KEPT).exists():
                shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


@cache
def _clear_once(kind: str, parent: Path) -> None:
    """Once a process: a temporary folder may hold thousands of files."""
    clear(kind, parent)


def _locked(folder: Path) -> int | None:
    """The descriptor that holds a folder's lock; None where somebody else has it. Errors: OSError for what is no folder of ours."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise PermissionError(f"{folder} belongs to another user")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
