"""What prep runs have finished in an output, so that one that was killed goes on without losing or repeating a document.

    OUTPUT/.resume/run.json.tmp                      what the run is: recipe, tokenizer, inputs. Another run is refused with the difference
    OUTPUT/.resume/parts/NAME/00003.jsonl.tmp        of one part: the fingerprints of its files, then a line for each shard once that is safe on disk
    OUTPUT/.resume/parts/NAME/00003_00000.bin.tmp    the held-out documents of each shard, joined at the end
The names end in .tmp because a finished artifact does not count such files; they are removed after COMPLETE. Nothing else is shared by the processes
of a run, which may work at the same time, one after another, or again.

Owns: the run's identity, its locks, reading and appending the lines. Refuses: another run in this folder, at once or before; inputs that changed.
"""

import errno
import fcntl
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_prism import artifact
from megatron_prism.data_prep.inputs import START, Position
from megatron_prism.data_prep.manifest import Shard
from megatron_prism.data_prep.parts import Part
from megatron_prism.data_prep.progress import console
from megatron_prism.errors import UserError

SHOWN_DIFFERENCES = 5
HELD_OUT_SUFFIX = ".tmp"
LOCK_SUFFIX = ".lock.tmp"


@dataclass
class Progress:
    """How far a part is: everything needed to go on from a chunk boundary. All counts are of the part up to `end`.

    lines: of the input that `end` lies in; digest: of a function's records.
    """

    end: Position = START
    finished: bool = False
    units: int = 0
    documents: int = 0
    lines: int = 0
    records: int = 0
    blank: int = 0
    empty: int = 0
    digest: str | None = None
    reasons: dict[str, int] = field(default_factory=dict)
    bad_samples: list[dict[str, Any]] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)


@dataclass
class Unit:
    """One finished line of a part's journal: its train shard, its held-out documents, and where the part stands after it."""

    train: Shard | None
    train_text_bytes: int
    held_out: Shard | None
    held_out_text_bytes: int
    progress: Progress


class Journal:
    """The resume folder of one output."""

    def __init__(self, output: Path):
        self.output, self.folder = output, output / ".resume"
        self._identity = self.folder / "run.json.tmp"

    @contextmanager
    def lock(self, shared: bool = False) -> Iterator[None]:
        """Hold the output, alone or with the other processes of a split run. Errors: UserError while others hold it; a killed run holds nothing."""
        self.output.mkdir(parents=True, exist_ok=True)
        with _locked(self.output, shared) as held:
            if not held:
                raise UserError(f"{self.output} is being written by another prep run; wait for it, or choose another output")
            yield

    @contextmanager
    def lock_of(self, work: str) -> Iterator[None]:
        """Hold what one process of several does at a time, waiting for the one that does it. Its file lies in the output until `remove`."""
        path = self.output / f"{work}{LOCK_SUFFIX}"
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path, waiting=f"waiting for another process, which holds {path}"):
            yield

    def check(self, identity: dict[str, Any]) -> bool:
        """Whether there is a killed run to take up. Errors: UserError with the differences when that one was of something else."""
        if not self._identity.is_file():
            return False
        self._refuse(json.loads(self._identity.read_text()), identity)
        return True

    def claim(self, identity: dict[str, Any]) -> None:
        """Say what this run is. Of several that start at once the first one says it. Errors: UserError when that one is of something else."""
        mine = self.folder / f"run.{uuid.uuid4().hex}.tmp"
        artifact.write_atomic(mine, json.dumps(identity, indent=1) + "\n")
        try:
            os.link(mine, self._identity)
        except FileExistsError:
            self.check(identity)
        except OSError:  # a file system without hard links
            mine.replace(self._identity)
        mine.unlink(missing_ok=True)

    def part(self, part: Part) -> "PartJournal":
        """The journal of a part."""
        return PartJournal(self.folder / "parts" / part.source / f"{part.number:05d}")

    def check_inputs(self, source: str, before: dict[str, str], now: dict[str, str]) -> None:
        """Errors: UserError naming the files of a part whose fingerprints are not those of its journal."""
        self._refuse(*({"inputs": {source: {path: {"fingerprint": each} for path, each in found.items()}}} for found in (before, now)))

    def _refuse(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        found = list(_differences(before, json.loads(json.dumps(now)), ""))
        if found:
            more = f" (and {len(found) - SHOWN_DIFFERENCES} more)" if len(found) > SHOWN_DIFFERENCES else ""
            listed = "; ".join(found[:SHOWN_DIFFERENCES]) + more
            raise UserError(f"{self.output} holds an unfinished prep of something else: {listed}; undo that, or use a new output")

    def remove(self) -> None:
        """Forget everything; only after COMPLETE. Who waited for a lock finds that first."""
        for lock in self.output.glob(f"*{LOCK_SUFFIX}"):
            lock.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


class PartJournal:
    """The lines of one part. prefix: of its files."""

    def __init__(self, prefix: Path):
        self._prefix, self._path = prefix, prefix.with_name(f"{prefix.name}.jsonl.tmp")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the part. Errors: UserError while another process does."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self._path) as held:
            if not held:
                raise UserError(f"{self._path} is being written by another prep run; give every process of a world a rank of its own")
            yield

    def fingerprints(self) -> dict[str, str] | None:
        """Those of the part's files when it was begun, by path; None where it was not."""
        lines = self._lines()
        return None if not lines else dict(json.loads(lines[0])["fingerprints"])

    def units(self) -> list[Unit]:
        """The finished units. Any process may ask."""
        return [_read_unit(json.loads(line)) for line in self._lines()[1:]]

    def begin(self, fingerprints: dict[str, str]) -> None:
        """Under the lock: drop a last line that was cut by a crash, and say of which files the part is, unless the first line does."""
        whole = b"".join(line + b"\n" for line in self._lines())
        if self._path.stat().st_size != len(whole):
            os.truncate(self._path, len(whole))
        if not whole:
            self._append({"fingerprints": fingerprints})

    def append(self, unit: Unit) -> None:
        """Record a finished unit, on disk before it returns."""
        self._append(asdict(unit))

    def forget(self, units: int) -> None:
        """Under the lock: the part is as if it had not been begun."""
        os.truncate(self._path, 0)  # the file stays: it is the lock
        for unit in range(units):
            for kind in ("bin", "idx", "mask"):
                prefix = self.held_out_prefix(unit)
                prefix.with_name(f"{prefix.name}.{kind}{HELD_OUT_SUFFIX}").unlink(missing_ok=True)

    def _append(self, content: dict[str, Any]) -> None:
        with self._path.open("ab") as file:
            file.write(json.dumps(content).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        artifact.sync_folder(self._path.parent)

    def _lines(self) -> list[bytes]:
        data = self._path.read_bytes() if self._path.is_file() else b""
        return data[: data.rfind(b"\n") + 1].splitlines()

    def held_out_prefix(self, unit: int) -> Path:
        """Where the held-out documents of a unit lie until the source is finished (prefix of two files, named with HELD_OUT_SUFFIX)."""
        return self._prefix.with_name(f"{self._prefix.name}_{unit:05d}")


@contextmanager
def _locked(path: Path, shared: bool = False, waiting: str | None = None) -> Iterator[bool]:
    """A lock on a file (made where it is missing) or folder, and whether it was had. waiting: wait for it, and say so if need be."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        held = _flock(descriptor, operation | fcntl.LOCK_NB, path)
        if not held and waiting is not None:
            console.print(waiting, highlight=False, soft_wrap=True)
            held = _flock(descriptor, operation, path)
        yield held
    finally:
        os.close(descriptor)


def _flock(descriptor: int, operation: int, path: Path) -> bool:
    """Whether the lock was had; without locks in the file system, a warning and True."""
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EBADF):  # EBADF: NFS locks no folders
            raise
        warnings.warn(f"the file system of {path} has no locks: nothing keeps a second prep run from doing the same work", stacklevel=5)
    return True


def _read_unit(content: dict[str, Any]) -> Unit:
    progress = Progress(**content["progress"])
    progress.end = Position(*progress.end)
    sizes = content["train_text_bytes"], content["held_out_text_bytes"]
    return Unit(_read_shard(content["train"]), sizes[0], _read_shard(content["held_out"]), sizes[1], progress)


def _read_shard(content: dict[str, Any] | None) -> Shard | None:
    return None if content is None else Shard.read(content)


def _differences(before: Any, now: Any, place: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from _differences(before.get(key), now.get(key), f"{place}.{key}" if place else str(key))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, pair in enumerate(zip(before, now, strict=True)):
            yield from _differences(*pair, f"{place}.{number}")
    elif isinstance(before, list) and isinstance(now, list):
        yield f"{place} had {len(before)} entries, now {len(now)}"
    elif before != now:
        yield f"{place} was {before!r}, now {now!r}"
