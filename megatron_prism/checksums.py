"""Checksums of files: taken while they are written or by reading them again, kept in a table beside them, compared before the files are used.

    SHARDED/checksums.json    {"schema_version": 1, "algorithm": "xxh3_128", "block_bytes": 16777216, "files": {NAME: {"bytes": N, "blocks": [...]}}}

Each block of 16 MiB has its own, so that who reads a part of a file compares just the blocks that the part lies in, and several ranks can share a
large file. xxh3 finds damage, not tampering: whoever can change a file can change the table. No torch here; called on any rank.
A file that is missing, cut short or other than written is damaged; one that the file system will not give out at present (EIO, a stale handle) is not
known to be: it is asked once more after a moment, and then the error is the machine's. Nor is one that this user may not read, which is said at once.
Refuses: a table that is none, or is of a newer schema.
"""

import errno
import json
import os
import stat
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import xxhash

from megatron_prism.errors import MachineError, UnreadableError, UserError

TABLE = "checksums.json"
SCHEMA_VERSION = 1
ALGORITHM = "xxh3_128"
BLOCK_BYTES = 1 << 24
THREADS = 4
"""that read and hash at a time: one reads while another's data is on its way; xxh3 lets go of the interpreter"""
RETRY_SECONDS = 2.0
"""after which a read that the file system refused is tried once more"""
MISSING = (FileNotFoundError, NotADirectoryError)
"""errors that say that a file is not there; all others say that nobody knows"""
FOR_PEOPLE = {
    errno.EACCES: "give this user leave to read it and to enter every folder above it (has a ticket run out?)",
    errno.EPERM: "give this user leave to read it and to enter every folder above it (has a ticket run out?)",
    errno.EISDIR: "a folder lies where a file belongs: move it away, and bring the file back from a copy",
    errno.ELOOP: "symbolic links lead round in a ring: put the file, or a link to it, in their place",
}
"""errors that no waiting mends, and what does"""
Found = TypeVar("Found")


class DamagedError(UserError):
    """A file is not what was written."""


def reading(path: Path, read: Callable[[], Found]) -> Found:
    """What `read` finds in a file. Errors: MISSING as they are; MachineError where the file system refuses it twice, UnreadableError where it would
    for ever: no file is damaged for that."""
    try:
        return read()
    except MISSING:
        raise
    except OSError as error:
        if error.errno in FOR_PEOPLE:
            raise UnreadableError(_unread(path, error, f"Mend it first: {FOR_PEOPLE[error.errno]}")) from None
        time.sleep(RETRY_SECONDS)  # a server that comes back, a handle that is looked up anew
    try:
        return read()
    except MISSING:
        raise
    except OSError as error:
        way_out = "Start the same command again; if it stays so, have the disk or its server mended, or bring the file back from a copy"
        raise MachineError(_unread(path, error, way_out, f", nor {RETRY_SECONDS:g} s later")) from None


def _unread(path: Path, error: OSError, way_out: str, again: str = "") -> str:
    name = errno.errorcode.get(error.errno or 0, "no number")
    return (
        f"{path} could not be read{again}: {error.strerror or error} ({name}). That does not say that it is damaged, and nothing was changed for it. "
        f"{way_out}"
    )


def size_of(path: Path) -> int | None:
    """The size of a file in bytes; None where there is none. Errors: as `reading`'s, where nobody knows."""
    try:
        found = reading(path, path.stat)
    except MISSING:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def is_folder(path: Path) -> bool:
    """Whether a folder is there. Errors: as `reading`'s, where nobody knows."""
    try:
        return stat.S_ISDIR(reading(path, path.stat).st_mode)
    except MISSING:
        return False


def real_path(path: Path) -> str:
    """`os.path.realpath`, which alone takes a link that it cannot read for none. Errors: as `reading`'s."""
    try:
        return reading(path, lambda: os.path.realpath(path, strict=True))
    except MISSING:
        return os.path.realpath(path)


@dataclass(frozen=True)
class Checksum:
    """Size of a file, and the xxh3_128 of each of its blocks."""

    bytes: int
    blocks: list[str]


class Summing:
    """A binary file that is written from beginning to end, and its checksum as it goes."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.written = file, 0
        self.error: OSError | None = None
        """of the first write that failed; what calls us may say less of it"""
        self._blocks: list[str] = []
        self._hasher, self._room = xxhash.xxh3_128(), BLOCK_BYTES

    def write(self, data: Any) -> int:
        """All of it. What was summed is what was asked to be written: a disk that stores something else is found when it is read."""
        view = memoryview(data).cast("B")
        try:
            done = 0
            while done < len(view):  # an unbuffered file may take a part
                done += self.file.write(view[done:])
        except OSError as error:
            self.error = self.error or error
            raise
        self.written += len(view)
        start = 0
        while start < len(view):
            part = view[start : start + self._room]
            self._hasher.update(part)
            start, self._room = start + len(part), self._room - len(part)
            if not self._room:
                self._blocks.append(self._hasher.hexdigest())
                self._hasher, self._room = xxhash.xxh3_128(), BLOCK_BYTES
        return len(view)

    def tell(self) -> int:
        """Bytes written so far."""
        return self.written

    def flush(self) -> None:
        """For those that write through this."""
        self.file.flush()

    def sync(self) -> None:
        """Have the file on disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def checksum(self) -> Checksum:
        """Of all that was written."""
        last = [self._hasher.hexdigest()] if self._room < BLOCK_BYTES else []
        return Checksum(self.written, [*self._blocks, *last])


def of_file(path: Path, sync: bool = False) -> Checksum:
    """A file's checksum, read from disk. sync: and have it on disk."""
    with path.open("rb") as file:
        blocks = [xxhash.xxh3_128_hexdigest(block) for block in iter(lambda: file.read(BLOCK_BYTES), b"")]
        if sync:
            os.fsync(file.fileno())
        return Checksum(file.tell(), blocks)


def of_bytes(data: bytes) -> Checksum:
    """The checksum of a file of this content."""
    blocks = [xxhash.xxh3_128_hexdigest(data[start : start + BLOCK_BYTES]) for start in range(0, len(data), BLOCK_BYTES)]
    return Checksum(len(data), blocks)


def damage(path: Path, expected: Checksum, blocks: Iterable[int] | None = None) -> str | None:
    """What is wrong with a file: expected and found; None where nothing is. blocks: those to look at; None: all. Errors: as `reading`'s."""
    chosen = list(range(len(expected.blocks)) if blocks is None else blocks)
    size = size_of(path)
    try:
        wrong = None if size != expected.bytes else reading(path, lambda: _wrong_block(path, expected, chosen))
    except MISSING:  # since a moment ago
        size = None
    if size is None:
        return f"{path} is missing; {expected.bytes} bytes were written"
    return f"{path} has {size} bytes; {expected.bytes} were written" if size != expected.bytes else wrong


def _wrong_block(path: Path, expected: Checksum, blocks: list[int]) -> str | None:
    with path.open("rb", buffering=0) as file:
        for index in blocks:
            found = _block(file, index, expected.bytes)
            if found != expected.blocks[index]:
                place = f"bytes {index * BLOCK_BYTES} to {min((index + 1) * BLOCK_BYTES, expected.bytes) - 1}"
                return f"{path} is not what was written: {place} have checksum {found}; expected {expected.blocks[index]} ({ALGORITHM})"
    return None


def _block(file: Any, index: int, size: int) -> str:
    length = min(BLOCK_BYTES, size - index * BLOCK_BYTES)
    buffer, done = memoryview(bytearray(length)), 0
    file.seek(index * BLOCK_BYTES)
    while done < length:
        count = file.readinto(buffer[done:])
        if not count:
            break
        done += count
    return xxhash.xxh3_128_hexdigest(buffer[:done])


def damages(folder: Path, expected: dict[str, Checksum]) -> list[str]:
    """What is wrong with these files of a folder, one text a file, by a few threads."""
    with ThreadPoolExecutor(THREADS) as pool:
        return [text for text in pool.map(lambda name: damage(folder / name, expected[name]), sorted(expected)) if text is not None]


def to_text(files: dict[str, Checksum]) -> str:
    """The table of a folder's files, to be written as its TABLE."""
    return json.dumps(to_record(files), indent=1) + "\n"


def to_record(files: dict[str, Checksum]) -> dict[str, Any]:
    """As a table says it."""
    return {
        "schema_version": SCHEMA_VERSION,
        "algorithm": ALGORITHM,
        "block_bytes": BLOCK_BYTES,
        "files": {name: asdict(found) for name, found in sorted(files.items())},
    }


def from_record(record: Any, where: Path) -> dict[str, Checksum]:
    """The files of a table. Errors: UserError where it is none, or a newer one."""
    try:
        if record["schema_version"] > SCHEMA_VERSION:
            raise UserError(f"{where} has schema {record['schema_version']}, this version reads up to {SCHEMA_VERSION}; upgrade megatron-prism")
        if (record["algorithm"], record["block_bytes"]) != (ALGORITHM, BLOCK_BYTES):
            raise UserError(f"{where}: checksums are {ALGORITHM} of {BLOCK_BYTES} bytes, this says {record['algorithm']}, {record['block_bytes']}")
        found = {name: Checksum(entry["bytes"], list(entry["blocks"])) for name, entry in record["files"].items()}
        if any(len(entry.blocks) != -(-entry.bytes // BLOCK_BYTES) for entry in found.values()):
            raise UserError(f"{where} is damaged: a file's checksums are not as many as its blocks of {BLOCK_BYTES} bytes")
        return found
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where} is no table of checksums ({type(error).__name__}: {error}): it is damaged") from None


def read_table(folder: Path) -> dict[str, Checksum] | None:
    """The checksums of a folder's files; None where it has no table. Errors: UserError for one that is none; MachineError as `reading`."""
    path = folder / TABLE
    try:
        content = reading(path, path.read_bytes)
    except MISSING:
        return None
    try:
        table = json.loads(content)
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}): it is damaged") from None
    return from_record(table, path)


# --- of an artifact: tables beside its files, and one in its mark for all others -----------------------------------------------------------------


def of_unlisted(folder: Path, names: list[str]) -> dict[str, Checksum]:
    """Checksums of the files that no table beside them has, and they on disk."""
    listed = {str(place / name) for place in _places(names) for name in read_table(folder / place) or {}}
    return {name: of_file(folder / name, sync=True) for name in names if name not in listed}


def expected(folder: Path, record: dict[str, Any], mark: str) -> tuple[dict[str, Checksum] | None, list[str]]:
    """What all files of a folder were, by its mark's record and the tables; and what is wrong with these. None: there are no checksums."""
    places = _places(record["files"])
    if "checksums" not in record:
        return None, [f"{folder / mark} is damaged: it names no checksums, but {places[0] / TABLE}"] if places else []
    found, wrong = from_record(record["checksums"], folder / mark), []
    for place in places:
        table = str(place / TABLE)
        text = damage(folder / table, found[table]) if table in found else f"{folder / mark} is damaged: it lacks {table}"
        if text is not None:
            wrong.append(text)
            continue
        found |= {str(place / name): checksum for name, checksum in (read_table(folder / place) or {}).items()}
    return found, wrong


def _places(names: Iterable[str]) -> list[Path]:
    return [Path(name).parent for name in names if Path(name).name == TABLE]
