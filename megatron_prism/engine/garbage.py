"""Python's garbage is collected between steps, after the same ones on all ranks.

Left alone each rank's Python collects at a moment of its own, for tenths of a second with all that a training imports, and at each of these moments
all ranks wait for one: with 128 of them nearly always. What is there when the steps begin is left out of collections for good (`gc.freeze`), so those
between steps take milliseconds.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def by_hand(interval: int | None) -> Iterator[None]:
    """Inside, nothing is collected but by `gc.collect()`, which the loop calls every `interval` steps; None: all is as Python has it."""
    if interval is None:
        yield
        return
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def is_due(interval: int | None, step: int, worked: bool) -> bool:
    """Whether the loop collects after this step: each `interval` steps, and after what makes more garbage than steps do (saves and what goes with
    them), whose copies would else wait in memory for the next such step; None: never.
    """
    return interval is not None and (worked or step % interval == 0)
