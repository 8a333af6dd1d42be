"""What a run that was ended in the middle of a save, or of a deletion, left behind: step folders that are not complete, as large as checkpoints.

Nobody reads them, and a step that was saved for a stop is not saved again, so that nothing else would take them away before the disk is full. Called
on rank 0 of a start, before the checkpoint to go on from is looked for, and before a save. Owns: what may go. Refuses: to touch anything where this
process has not the folder for itself (`run_lock`), since another may be writing it at this moment; what changed a moment ago, since some mounts lock
on each machine alone, and somebody may be copying a checkpoint back; a finished run, whose files are counted; another stage's folder; what was set
aside as damaged, and links.
"""

import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path

from megatron_prism import artifact
from megatron_prism.engine import run_folder, run_lock

logger = logging.getLogger(__name__)
MARK = ".leftover.tmp"
SHOWN = 3
STILL_SECONDS = run_lock.WAIT_SECONDS
"""in which nothing may have changed in a folder that goes"""
_young: dict[Path, list[Path]] = {}
"""of a run: the folders that were not still at its start"""


def remove(run: Path, stage: str) -> list[Path]:
    """Take them away, and say once which they were and how large; those that are gone.

    Rank 0 alone writes COMPLETE, and the rank 0 that began them is dead, or the lock would be held: should another rank of its launch still write
    into one, on a machine of its own, nothing there can become a checkpoint any more; what it leaves, the next start removes.
    """
    if not run_folder.is_of(run, stage) or artifact.is_complete(run):
        return []
    folders = [folder for folder in sorted((run / run_folder.CHECKPOINTS).glob("step_????????")) if folder.is_dir() and not folder.is_symlink()]
    if not run_lock.is_held(run):
        folders = [folder for folder in folders if not artifact.is_complete(folder)]
        if folders:
            logger.warning("%s not complete; it is left as it is, since %s could not be locked, and another run may be writing", _named(folders), run)
        return []
    left = [folder for folder in folders if _is_left(folder)]
    young = [folder for folder in left if not _is_still(folder)]
    if young:
        _young[run] = young
        told = "%s not complete, and something in it changed within %g s: it may be written elsewhere, and is left until a later save or start"
        logger.warning(told, _named(young), STILL_SECONDS)
    return _take_away([folder for folder in left if folder not in young])


def remove_later(run: Path) -> list[Path]:
    """Before a save needs their room: what was not still at the start of this run, and is now; those that are gone."""
    young = [folder for folder in _young.pop(run, []) if folder.is_dir() and _is_left(folder)]
    still = [folder for folder in young if _is_still(folder)]
    if len(still) < len(young):
        _young[run] = [folder for folder in young if folder not in still]
    return _take_away(still)


def _take_away(folders: list[Path]) -> list[Path]:
    if not folders:
        return []
    said = _named(folders)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    left = [folder for folder in folders if folder.exists()]
    logger.warning("%s not complete, by a run that was ended in the middle of it: %s", said, f"could not be removed: {left}" if left else "removed")
    return [folder for folder in folders if folder not in left]


def _is_still(folder: Path) -> bool:
    """Whether it is empty, or nothing in it changed for a while, by the clock of who keeps it: the mark was touched just now. A copy may keep the
    time at which a file's content was written, but not the one at which its entry changed."""
    mark = folder / MARK
    try:
        changes = [path.lstat().st_ctime for path in folder.rglob("*") if path != mark]
        return not changes or mark.stat().st_ctime - max(changes) >= STILL_SECONDS
    except OSError:  # something vanished meanwhile, or nobody knows
        return False


def _is_left(folder: Path) -> bool:
    """Whether the folder has no COMPLETE. A client of a network's file system answers from memory, unless it changed the folder itself: it does."""
    mark = folder / MARK
    try:
        mark.touch()
        left = artifact.COMPLETE not in os.listdir(folder)  # noqa: PTH208 (names; it says what the server says, or raises)
    except OSError:
        return False
    if not left:
        mark.unlink(missing_ok=True)
    return left


def _named(folders: list[Path]) -> str:
    """ "2 checkpoints, 1.50 GiB (.../step_00000007, ...) are": however large they are."""
    size = 0
    for folder in folders:
        for path in folder.rglob("*"):
            with suppress(OSError):
                size += path.lstat().st_size if path.is_file() else 0
    names = ", ".join(str(folder) for folder in folders[:SHOWN]) + (f", and {len(folders) - SHOWN} more" if len(folders) > SHOWN else "")
    return f"{len(folders)} checkpoint{'s' if len(folders) > 1 else ''}, {size / 2**30:.2f} GiB ({names}), {'are' if len(folders) > 1 else 'is'}"
