"""Writing the sharded folder of a checkpoint: now, or in the background while the run goes on.

    SHARDED/__RANK_N.distcp, common.pt, .metadata, checksums.json, metadata.json (last)

What is written where is planned by all ranks together (`mcore.plan_sharded`); then each rank writes its own files without waiting for another, with
checksums as the bytes pass; then all tell rank 0 how it went, and it writes what says where everything lies, or every rank ends with the same error.
In the background, a rank keeps one copy of its part in host memory, and its thread talks to the others' over a process group of its own, so that
neither the order of the steps' collectives nor their timing matters. One save at a time: the next one waits.
Owns: that, the room on the disk that a save needs, and what a failed one says. Called on every rank. Refuses: a save that the disk has no room for.
"""

import copy
import errno
import io
import logging
import shutil
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.storage import WriteResult

from megatron_prism import artifact, checksums
from megatron_prism.checksums import Checksum, Summing
from megatron_prism.engine import mcore, parallel
from megatron_prism.engine.mcore import ShardedPlan
from megatron_prism.engine.ranks import concluded, on_all, on_main, taken, tried
from megatron_prism.engine.sharded import BACKENDS, COMMON, CONFIG, METADATA, alone, without_crc
from megatron_prism.engine.torch_private import StorageInfo
from megatron_prism.errors import MachineError, UserError

logger = logging.getLogger(__name__)
FILES_PER_RANK = 2
"""written by a thread each"""
BUFFER_BYTES = 1 << 20
"""small writes are gathered: torch.save makes a dozen for each tensor"""
ALIGNMENT_BYTES = 64
FOR_PEOPLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG})
"""errors of a write that stay until somebody mends them; any other (a disk's, a network's) may be gone at the next start"""


@dataclass
class Written:
    """What a rank wrote: where each item lies, and the checksum of each file."""

    results: list[WriteResult] = field(default_factory=list)
    files: dict[str, Checksum] = field(default_factory=dict)


def save_sharded(state: dict[str, Any], folder: Path) -> None:
    """Write a sharded state dict into a folder that is there; every byte is on disk when it returns. Errors: UserError, the same on every rank."""
    plan = mcore.plan_sharded(state, folder)
    check_room(plan)
    carry_out(plan, lambda: None)


def carry_out(
    plan: ShardedPlan,
    complete: Callable[[], None],
    group: dist.ProcessGroup | None = None,
    snapshot: Callable[[], ShardedPlan] | None = None,
) -> None:
    """Write what is planned. complete: what rank 0 does when all of it is on disk. Errors: UserError, the first rank's, on every rank.

    snapshot: gives the plan over copies, which are written in place of what the plan holds; where it fails, this rank's writing has failed.
    """

    def finish(written: list[Written]) -> None:
        with reporting(plan.folder):
            _finish(plan, written)
            complete()

    concluded(lambda: _write(plan if snapshot is None else snapshot()), finish, group)


def _write(plan: ShardedPlan) -> Written:
    """This rank's files, and rank 0's common.pt."""
    if any(isinstance(data, Tensor) and data.is_cuda for _, data in plan.items):
        torch.cuda.synchronize()  # threads read what this one's streams compute
    rank, found = dist.get_rank(), Written()
    shares = [(f"__{rank}_{number}.distcp", items) for number, items in enumerate(_shares(plan.items))]
    if rank == 0:
        buffer = io.BytesIO()
        torch.save(plan.common, buffer)
        found.files[COMMON] = _write_file(plan.folder / COMMON, lambda file: [file.write(buffer.getbuffer())])[1]
    device = next((data.device for _, data in plan.items if isinstance(data, Tensor) and data.is_cuda), None)
    use_it = None if device is None else partial(torch.cuda.set_device, device)  # a new thread's is GPU 0
    with without_crc(), ThreadPoolExecutor(FILES_PER_RANK, initializer=use_it) as pool:
        jobs = [pool.submit(_write_file, plan.folder / name, _all_of(items, name)) for name, items in shares]
    for (name, _), job in zip(shares, jobs, strict=True):
        results, found.files[name] = job.result()
        found.results += results
    return found


def _all_of(items: list[tuple[Any, Any]], name: str) -> Callable[[Summing], list[Any]]:
    return lambda file: [_write_item(file, item, data, name) for item, data in items]


def _write_file(path: Path, write: Callable[[Summing], list[Any]]) -> tuple[list[Any], Checksum]:
    with reporting(path), path.open("wb", buffering=BUFFER_BYTES) as raw:
        file = Summing(raw)
        try:
            results = write(file)
        except Exception:
            if file.error is not None:  # torch says only that some write failed
                raise file.error from None
            raise
        file.sync()
        return results, file.checksum()


def _write_item(file: Summing, item: Any, data: Any, name: str) -> WriteResult:
    start = file.tell()
    if isinstance(data, io.BytesIO):
        file.write(data.getbuffer())
    else:
        torch.save(alone(data.detach().cpu()), file)
    length = file.tell() - start
    return WriteResult(index=item.index, size_in_bytes=length, storage_data=StorageInfo(name, start, length))


def _shares(items: list[tuple[Any, Any]]) -> list[list[tuple[Any, Any]]]:
    """A rank's items for its files, of near-equal size; objects first."""
    shares: list[list[tuple[Any, Any]]] = [[] for _ in range(FILES_PER_RANK)]
    sizes = [0] * FILES_PER_RANK
    for item, data in sorted(items, key=lambda pair: (not isinstance(pair[1], io.BytesIO), -num_bytes(pair[1]))):
        least = sizes.index(min(sizes))
        shares[least].append((item, data))
        sizes[least] += num_bytes(data)
    return [share for share in shares if share]


def _finish(plan: ShardedPlan, written: list[Written]) -> None:
    """Rank 0: what says where everything lies, and what it was."""
    files = {name: checksum for part in written for name, checksum in part.files.items()}
    lost = [text for name, checksum in files.items() if (text := checksums.damage(plan.folder / name, checksum, blocks=())) is not None]
    if lost:  # older checkpoints are deleted for this one
        raise UserError(
            f"{lost[0]} by its rank: rank 0 sees {len(lost)} of {len(files)} files so. All machines must write to one disk that they share; this "
            "checkpoint was given up, those that are complete are as they were. Give output a folder that all see, then start the same command again"
        )
    plan.finish([part.results for part in written])
    files |= {METADATA: checksums.of_file(plan.folder / METADATA), CONFIG: checksums.of_bytes(BACKENDS.encode())}
    artifact.write_atomic(plan.folder / checksums.TABLE, checksums.to_text(files))
    artifact.write_atomic(plan.folder / CONFIG, BACKENDS)


def num_bytes(data: Any) -> int:
    """Size of a tensor or of a buffer."""
    return data.nbytes if isinstance(data, Tensor) else len(data.getbuffer())


# --- room, and errors ----------------------------------------------------------------------------------------------------------------------------


def check_room(plan: ShardedPlan) -> int:
    """What all ranks are about to write, in bytes. Errors: UserError where the disk has less room, before anything is written."""
    needed = sum(on_all(lambda _: sum(num_bytes(data) for _, data in plan.items)))

    def check() -> None:
        free = shutil.disk_usage(plan.folder).free
        if free < needed:
            raise UserError(
                f"{plan.folder.parent} needs {_gib(needed)}, and {_gib(free)} are free there: nothing was written, checkpoints that are complete "
                "are as they were. Free some space, or keep fewer checkpoints (checkpoint.keep_last), then start the same command again"
            )

    on_main(check)
    return needed


def warn_of_little_room(folder: Path, needed: int) -> None:
    """Rank 0, after a save: say so where the next one, of as many bytes, will find no room."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        logger.warning("%s: %s are free, the next checkpoint needs %s: free some space before it is due", folder, _gib(free), _gib(needed))


class reporting:  # noqa: N801 (reads as a verb where it is used)
    """Inside, an error of the file system becomes one for people: which file, how many bytes are free, what to do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            kind = UserError if error.errno in FOR_PEOPLE else MachineError
            raise kind(_failed_write(self.path, error)) from None


def _failed_write(path: Path, error: OSError) -> str:
    try:
        room = f"{shutil.disk_usage(path.parent).free:,} bytes are free there"
    except OSError:
        room = "its folder cannot be asked for free space"
    return (
        f"{error.filename or path} could not be written: {error.strerror or error}; {room}. This checkpoint was given up and is not read; those "
        "that are complete are as they were. Make the disk usable (space, quota, permission), then start the same command again to go on from there"
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


# --- in the background ---------------------------------------------------------------------------------------------------------------------------


class Background:
    """Writes one checkpoint at a time while the run takes its steps. Every rank has one; they begin and wait at the same steps."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._group: dist.ProcessGroup | None = None
        self._room: Tensor | None = None
        self._pinned = False
        self._error: BaseException | None = None
        self._saved: list[tuple[Path, float]] = []

    @property
    def is_busy(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """Whether a save failed and nobody was told yet: `wait` does, on every rank."""
        return self._error is not None

    def start(self, plan: ShardedPlan, complete: Callable[[], None], give_up: Callable[[], None]) -> None:
        """Copy what is planned to host memory, and have it written meanwhile. complete, give_up: what rank 0 does at the end, good or bad.

        Errors: those of the save before this one. A copy that fails is told as a write that fails is: by the threads to each other, so that no rank
        goes on alone, and then by `wait`.
        """
        self.wait()
        self._group = self._group or parallel.host_group()
        begun, copied, kept = time.perf_counter(), tried(lambda: self._copied(plan)), replace(plan, items=[], common={})

        def work() -> None:
            try:
                carry_out(kept, complete, self._group, snapshot=lambda: taken(copied))
                self._saved.append((kept.folder.parent, time.perf_counter() - begun))
            except BaseException as error:  # whatever it is, `wait` tells it
                self._error = error
                if dist.get_rank() == 0:
                    with suppress(OSError):
                        give_up()

        self._thread = threading.Thread(target=work, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until what was begun is complete on every rank's disk. Errors: its own, on every rank."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def end(self) -> None:
        """Wait, and say an error where nobody else will: the run is ending for another reason, or is over."""
        try:
            self.wait()
        except Exception as error:
            logger.error("the checkpoint in the background was not saved: %s", error)
        self._free()

    def news(self) -> list[tuple[Path, float]]:
        """The checkpoints that became complete since this was asked last, with the seconds that each took."""
        saved = self._saved[:]
        del self._saved[: len(saved)]
        return saved

    def _free(self) -> None:
        if self._room is not None and self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._room.data_ptr())
        self._room = None

    def _copied(self, plan: ShardedPlan) -> ShardedPlan:
        """The plan over copies in host memory, one buffer that is kept for the next save: pages that were used before are copied to much faster."""
        tensors = [data for _, data in plan.items if isinstance(data, Tensor)]
        starts, end = [], 0
        for tensor in tensors:
            starts.append(end)
            end += -(-tensor.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if self._room is None or self._room.numel() < end:
            self._free()
            self._room = _host_memory(end)
            self._pinned = any(tensor.is_cuda for tensor in tensors) and _pin(self._room)
        room, places = self._room, iter(starts)
        items = [(item, _copy_into(room, next(places), data) if isinstance(data, Tensor) else data) for item, data in plan.items]
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return replace(plan, items=items, common=copy.deepcopy(plan.common))


def _host_memory(count: int) -> Tensor:
    """Bytes to copy into. Errors: MachineError where the machine has not so many: another start may find them."""
    try:
        return torch.empty(count, dtype=torch.uint8)
    except (RuntimeError, MemoryError):
        raise MachineError(
            f"{_gib(count)} of host memory for the copy of a checkpoint cannot be had on {socket.gethostname()}: it was given up, those that are "
            "complete are as they were. Leave it more memory, or save without a copy (checkpoint.async_save=false), and start the same command again"
        ) from None


def _pin(room: Tensor) -> bool:
    """Register memory as it is: torch's own pinned memory comes in powers of two. Where that is not allowed, copies take longer, and that is all."""
    status = int(torch.cuda.cudart().cudaHostRegister(room.data_ptr(), room.numel(), 0))
    if status:
        logger.warning("%s of host memory for checkpoints cannot be pinned (CUDA error %d): copying to it takes longer", _gib(room.numel()), status)
        with suppress(RuntimeError):  # CUDA remembers the error until somebody asks for the last one: a launch does, and takes it for its own
            torch.ones(1, device="cuda")
    return status == 0


def _copy_into(room: Tensor, start: int, tensor: Tensor) -> Tensor:
    place = room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return place.copy_(tensor.detach(), non_blocking=True)
