"""One .bin/.idx pair, checked against itself and read through once: checksums, the vocabulary, the ends of documents.

Owns: finding pairs, the checks of an index against its .bin, the pass over the tokens. Memory: CHUNK_BYTES, whatever the file; indices are mapped.
Refuses, by name: half of a pair, a .bin of another size than its index says (cut short, or of another pair), indices with gaps, ids outside of the
vocabulary, files that change while they are read.
"""

import glob
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_prism.data_prep.manifest import BlockHasher, Shard, file_sha256
from megatron_prism.data_prep.shards import Tables, bin_path, idx_path, open_tables
from megatron_prism.errors import UserError

CHUNK_BYTES = 8 << 20
ROWS = 1 << 20
"""Entries of an index that are checked at once."""
Advance = Callable[[int, int, int], None]


@dataclass(frozen=True)
class Expected:
    """What the tokens must agree with, and how strictly."""

    vocab_size: int
    end_of_document: int
    refuse_missing_end: bool
    each_sequence: bool


@dataclass(frozen=True)
class Scanned:
    """What a pass over a pair found. largest: its largest id, -1 without tokens; first_without_end: a document's number in the pair."""

    shard: Shard
    dtype: str
    largest: int
    empty: int
    without_end: int
    first_without_end: int | None


def find_pairs(pattern: str, source: str) -> list[Path]:
    """The prefixes that a path or pattern stands for, sorted. Errors: UserError for no match, and for half of a pair."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        files = [entry for entry in path.rglob("*") if entry.suffix in (".bin", ".idx") and entry.is_file()]
    elif bin_path(path).is_file() or idx_path(path).is_file():
        files = [bin_path(path)]
    else:
        names = [path] if path.is_file() else [Path(name) for name in glob.glob(str(path), recursive=True)]  # noqa: PTH207 (takes absolute patterns)
        files = [name for name in names if name.suffix in (".bin", ".idx") and name.is_file()]
    if not files:
        raise UserError(f"source {source!r}: {pattern!r} matches no .bin or .idx file; check the path")
    prefixes = sorted({file.with_name(file.name[:-4]) for file in files})
    for prefix in prefixes:
        for half, other in ((bin_path(prefix), idx_path(prefix)), (idx_path(prefix), bin_path(prefix))):
            if not half.is_file():
                raise UserError(f"source {source!r}: {other} has no {half.name} beside it; both files of a pair are needed")
    return prefixes


def check_tables(prefix: Path, each_sequence: bool) -> Tables:
    """The tables of a pair whose index describes its .bin from the first byte to the last without a gap. Reads the index only. Errors: UserError."""
    tables, index, data = open_tables(idx_path(prefix)), idx_path(prefix), bin_path(prefix)
    _check_documents(index, tables, each_sequence)
    size, width, place = data.stat().st_size, np.dtype(tables.dtype).itemsize, 0
    for first in range(0, len(tables.lengths), ROWS):
        lengths, starts = tables.lengths[first : first + ROWS].astype(np.int64), tables.starts[first : first + ROWS]
        ends = place + np.cumsum(lengths) * width
        wrong = (lengths < 0) | (starts != ends - lengths * width)
        if wrong.any():
            row = int(wrong.argmax())
            expected = int(ends[row] - lengths[row] * width)
            raise UserError(
                f"{index}: sequence {first + row} has {int(lengths[row])} tokens at byte {int(starts[row])}, where byte {expected} is expected: "
                "the index was changed, or skips parts of its .bin, which cannot be adopted"
            )
        place = int(ends[-1])
    if size != place:
        what = "it was cut short" if size < place else "it is the .bin of another pair, or was still being written when the index was"
        raise UserError(f"{data} has {size} bytes, its index describes {place}: {what}; copy the pair again")
    return tables


def _check_documents(index: Path, tables: Tables, each_sequence: bool) -> None:
    """Megatron-LM gives a text without tokens a document without sequences: such entries repeat a bound, and are no documents here."""
    sequences, place = len(tables.lengths), 0
    for first in range(0, len(tables.documents), ROWS):
        bounds = tables.documents[first : first + ROWS]
        steps = np.diff(bounds, prepend=place)
        if (first == 0 and bounds[0] != 0) or (steps < 0).any():
            raise UserError(f"{index}: the bounds of its documents do not rise from 0: the index was changed; copy the pair again")
        if not each_sequence and (steps > 1).any():
            raise UserError(
                f"{index}: a document, number {first + int((steps > 1).argmax()) - 1}, packs several sequences (--split-sentences, or a tool that "
                "ends no documents); set sequences=documents to take each of them as a document"
            )
        place = int(bounds[-1])
    if place != sequences:
        raise UserError(f"{index} bounds documents up to sequence {place} and has {sequences} sequences: the index was changed; copy the pair again")


def scan(prefix: Path, name: str, expected: Expected, advance: Advance) -> Scanned:
    """Read a pair once. name: for the manifest. advance: told bytes, documents and tokens as they are done. Errors: UserError."""
    tables, data = check_tables(prefix, expected.each_sequence), bin_path(prefix)
    before, width = data.stat(), np.dtype(tables.dtype).itemsize
    hasher, place, largest, without, first = BlockHasher(), 0, -1, 0, None
    with data.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            hasher.update(chunk)
            if len(chunk) % width:
                break  # cut short since its size was checked: the comparison below says so
            tokens = np.frombuffer(chunk, tables.dtype)
            largest = max(largest, _check_vocabulary(tokens, place // width, data, tables, expected))
            ended, missing = _ends_in(tokens, place, tables, before.st_size, expected.end_of_document)
            if len(missing):
                first = int(missing[0]) if first is None else first
                without += len(missing)
                _refuse_missing_end(data, first, expected)
            place += len(chunk)
            advance(len(chunk), ended, len(tokens))
    after = data.stat()
    if place != before.st_size or (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UserError(f"{data} was changed while it was read; wait until nothing writes it, and run again")
    index = idx_path(prefix)
    count = len(tables.lengths)
    shard = Shard(name, count, place // width, place, index.stat().st_size, file_sha256(index), hasher.blocks())
    return Scanned(shard, tables.dtype, largest, int(count - np.count_nonzero(tables.lengths)), without, first)


def _check_vocabulary(tokens: NDArray[np.integer], first: int, data: Path, tables: Tables, expected: Expected) -> int:
    """The largest id. Errors: UserError for one that the tokenizer has not."""
    largest = int(tokens.max())
    if largest >= expected.vocab_size or int(tokens.min()) < 0:
        place = int(((tokens >= expected.vocab_size) | (tokens < 0)).argmax())
        document = int(np.searchsorted(tables.starts, (first + place) * tokens.itemsize, side="right")) - 1
        raise UserError(
            f"{data}, document {document}: token {first + place} of the file is id {int(tokens[place])}, the tokenizer has ids 0 to "
            f"{expected.vocab_size - 1}: another tokenizer made these shards, or their dtype is not what the index says"
        )
    return largest


def _ends_in(tokens: NDArray[np.integer], place: int, tables: Tables, size: int, end: int) -> tuple[int, NDArray[np.int64]]:
    """How many documents end in the bytes from `place` on, and the numbers of those (with tokens) whose last id is not `end`."""
    stop = place + tokens.nbytes
    # A document ends where the next begins, and the last at the end of the file.
    low, high = (int(row) for row in np.searchsorted(tables.starts, [place, stop], side="right"))
    ends = np.asarray(tables.starts[low:high])
    if stop == size:
        ends = np.append(ends, size)
    documents = np.arange(low, low + len(ends)) - 1
    filled = (documents >= 0) & (tables.lengths[np.maximum(documents, 0)] > 0)
    last = tokens[(ends[filled] - place) // tokens.itemsize - 1]
    return len(ends), documents[filled][last != end]


def _refuse_missing_end(data: Path, document: int, expected: Expected) -> None:
    if expected.refuse_missing_end:
        raise UserError(
            f"{data}: document {document} does not end with the end-of-document id {expected.end_of_document}; set end_of_document to the token "
            "that was appended, or on_missing_end=warn to train on documents that run into each other"
        )
