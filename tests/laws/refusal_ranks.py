"""Started on N ranks: trains each case of a JSON file in one launch, and keeps what each rank was told where one is refused.

    refusal_ranks.py CASES.json
    CASES: {"common": ["key=value", ...], "cases": {"name": {"set": [...], "fault": null, "at": 4}}}

The words of a UserError, "" where there was none, and the seconds that the case took go to FOLDER/NAME.RANK. A fault meets the save of step `at`;
without a launcher (no RANK) it is a world of one.
"""

import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from megatron_prism import checksums
from megatron_prism.config import load_recipe
from megatron_prism.engine import checkpoint, loop, parallel, saving
from megatron_prism.engine.recipe import TrainConfig
from megatron_prism.errors import UserError

FILLER = "filler"
LEFT_BYTES = 300_000
SLOW_SECONDS = float(os.environ.get("SLOW_SECONDS", "0.5"))
CHECK_ROOM, WRITE, WRITE_FILE, HOST_MEMORY = saving.check_room, saving._write, saving._write_file, saving._host_memory
BLOCK = checksums._block


def fill(folder: Path) -> None:
    """Rank 0: leave little room on the disk that a folder is on. All: wait for that."""
    if dist.get_rank() == 0:
        with (folder / FILLER).open("wb", buffering=0) as file:
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(50_000))
            file.truncate(file.tell() - LEFT_BYTES)
    dist.barrier()


def is_at(plan: Any, step: int) -> bool:
    return plan.folder.parent.name == f"step_{step:08d}"


def filling(step: int, disk: Path, early: bool) -> Callable[[Any], int]:
    """The check of the room, and before or after it somebody else fills the disk."""

    def check(plan: Any) -> int:
        if is_at(plan, step) and early:
            fill(disk)
        needed = CHECK_ROOM(plan)
        if is_at(plan, step) and not early:
            fill(disk)
        return needed

    return check


def one_full_disk(path: Path, write: Any) -> Any:
    """Rank 1's own files lie where every write fails as on a full disk."""
    if dist.get_rank() == 1 and "step_00000004" in str(path):
        path.symlink_to("/dev/full")
    return WRITE_FILE(path, write)


def one_without_memory(count: int) -> Any:
    """Rank 1 asks for more host memory than any machine has."""
    return HOST_MEMORY(count << 40 if dist.get_rank() == 1 else count)


def refused_reads(times: int) -> Callable[[Any, int, int], str]:
    """So often, rank 1 cannot read a file of the checkpoint of step 4."""
    refused: list[str] = []

    def block(file: Any, index: int, size: int) -> str:
        if dist.get_rank() == 1 and len(refused) < times and "step_00000004" in file.name:
            refused.append(file.name)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return BLOCK(file, index, size)

    return block


def slowly(plan: Any) -> Any:
    """Some steps are taken before the first byte is written."""
    time.sleep(SLOW_SECONDS)
    return WRITE(plan)


def not_copied(room: Any, start: int, tensor: Any) -> Any:
    """The snapshot is the very memory that the next steps change."""
    return tensor


@contextlib.contextmanager
def planted(fault: str | None, step: int, disk: Path) -> Iterator[None]:
    """One fault, by name; `slow` and `slow, not copied` are about saves in the background."""
    with contextlib.ExitStack() as stack:
        if fault in ("full", "full early"):
            stack.enter_context(mock.patch.object(checkpoint, "check_room", filling(step, disk, fault == "full early")))
        elif fault == "one rank":
            stack.enter_context(mock.patch.object(saving, "_write_file", one_full_disk))
        elif fault == "one copy":
            stack.enter_context(mock.patch.object(saving, "_host_memory", one_without_memory))
        elif fault in ("no read", "one read"):
            stack.enter_context(mock.patch.object(checksums, "_block", refused_reads(1 if fault == "one read" else 1000)))
        elif fault is not None:
            assert fault in ("slow", "slow, not copied"), fault
            stack.enter_context(mock.patch.object(saving, "_write", slowly))
            if fault != "slow":
                stack.enter_context(mock.patch.object(saving, "_copy_into", not_copied))
        yield


def main() -> None:
    """Run every case in turn."""
    folder = Path(sys.argv[1]).parent
    plan = json.loads(Path(sys.argv[1]).read_text())
    rank = os.environ.get("RANK", "0")
    for name, case in plan["cases"].items():
        words, kind, begun = "", "", time.monotonic()
        with planted(case.get("fault"), case.get("at", 4), folder):
            try:
                loop.train(load_recipe(None, [*plan["common"], *case["set"]], TrainConfig))
            except UserError as error:
                words, kind = str(error), type(error).__name__
        dist.barrier()
        if rank == "0":
            (folder / FILLER).unlink(missing_ok=True)
        dist.barrier()
        (folder / f"{name}.{rank}").write_text(json.dumps({"words": words, "kind": kind, "seconds": time.monotonic() - begun}))
    parallel.stop()


if __name__ == "__main__":
    main()
