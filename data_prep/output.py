"""What `prism prep` and `prism adopt` have in common: an output that is finished is left alone, one that is not is made under its lock.

Refuses: finished outputs of another recipe or of inputs that changed since, a second run at once, and going on when the disk is full.
"""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from megatron_prism import artifact
from megatron_prism.data_prep.journal import Journal
from megatron_prism.errors import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Made = TypeVar("Made")


def make(
    output: Path, config: BaseModel, inputs: str, changes: Callable[[], list[str]], work: Callable[[], Made], shared: bool = False
) -> Made | None:
    """What `work` returns, or None where the output is finished. inputs, changes: what it is made from, and which of them differ from when it was.

    shared: several processes work on it. Errors: UserError.
    """
    if artifact.is_current(output, config):
        if changed := changes():
            raise UserError(f"{output} was made from other {inputs}: {', '.join(changed[:5])} changed; choose another output or remove the folder")
        Journal(output).remove()  # what a run left that was killed right after the end
        artifact.left_as_it_is(output)
        return None
    if artifact.is_complete(output):
        artifact.begin(output, "prep", config)  # refuses a finished output of another recipe
    try:
        with Journal(output).lock(shared):
            return work()
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise UserError(f"{output} cannot be written on ({error}); make room and run the same command again: it goes on where it stopped") from None
