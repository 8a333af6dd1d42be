"""What the pre-pass has found so far of one source, on disk: a file for each column, appended to, and a journal line for each finished unit.

    OUTPUT/.resume/cleaning/NAME/{exact,band_00,...,low,code,place,chunks,cuts,contaminated}.tmp    journal.jsonl.tmp
A unit counts once its journal line is on disk; what a killed run wrote after the last line is cut off when the source is taken up again.

Owns: these files. Refuses: files that are shorter than the journal says.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_prism import artifact
from megatron_prism.data_prep.cleaning.scan import Plan
from megatron_prism.data_prep.inputs import START, Position
from megatron_prism.errors import UserError

JOURNAL = "journal.jsonl.tmp"
KEPT_FOR_TOKENISING = ("verdict", "chunks", "cuts")
READ_BYTES = 1 << 20


@dataclass
class State:
    """How far a source is scanned. rows: of every column; lines: of the input that `end` lies in; digest: of a function's records."""

    end: Position = START
    finished: bool = False
    digest: str | None = None
    lines: int = 0
    rows: dict[str, int] = field(default_factory=dict)


def column_types(plan: Plan) -> dict[str, tuple[str, int]]:
    """Type and width of every column: of documents, but for chunks (input, offset, first document, documents), cuts (document, start, stop) and
    contaminated (bytes of JSON lines)."""
    types = {"code": ("u1", 1), "place": ("i8", 2), "chunks": ("i8", 4), "cuts": ("i8", 3), "contaminated": ("u1", 1)}
    if plan.exact:
        types["exact"] = ("u8", 2)
    if plan.near:
        types |= {band_column(band): ("u8", 1) for band in range(plan.near[2])} | {"low": ("u1", plan.near[1])}
    return types


def band_column(band: int) -> str:
    """The column of a band's keys."""
    return f"band_{band:02d}"


class Columns:
    """The columns of one source: taken up where the journal ends."""

    def __init__(self, folder: Path, types: dict[str, tuple[str, int]]):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._types = folder, types
        self.state = self._last_state()
        self._files = {}
        for name in types:
            path = self._path(name)
            whole = self.state.rows.get(name, 0) * self._row_bytes(name)
            if whole and (not path.is_file() or path.stat().st_size < whole):
                raise UserError(f"{path} is shorter than the {whole} bytes of its journal: it was changed; remove the output folder and start anew")
            self._files[name] = path.open("r+b" if path.is_file() else "w+b")
            self._files[name].truncate(whole)
            self._files[name].seek(whole)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.tmp"

    def _row_bytes(self, name: str) -> int:
        kind, width = self._types[name]
        return np.dtype(kind).itemsize * width

    def _last_state(self) -> State:
        path = self.folder / JOURNAL
        data = path.read_bytes() if path.is_file() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            with path.open("r+b") as file:
                file.truncate(len(whole))
        if not whole:
            return State()
        state = State(**json.loads(whole.splitlines()[-1]))
        state.end = Position(*state.end)
        return state

    @property
    def documents(self) -> int:
        """Rows of the columns of documents, finished units alone."""
        return self.state.rows.get("code", 0)

    def append(self, name: str, rows: NDArray[Any]) -> None:
        """Add rows; they count from the next `commit` on."""
        kind, width = self._types[name]
        data = np.ascontiguousarray(rows, kind)
        assert data.size % width == 0, (name, data.shape)
        self._files[name].write(data.tobytes())

    def commit(self, end: Position, finished: bool, digest: str | None, lines: int) -> None:
        """Close a unit: everything appended is on disk when this returns."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        rows = {name: file.tell() // self._row_bytes(name) for name, file in self._files.items()}
        self.state = State(end, finished, digest, lines, rows)
        with (self.folder / JOURNAL).open("ab") as journal:
            journal.write(json.dumps(asdict(self.state)).encode() + b"\n")
            journal.flush()
            os.fsync(journal.fileno())
        artifact.sync_folder(self.folder)

    def close(self) -> None:
        """Let go of the files."""
        for file in self._files.values():
            file.close()

    def read(self, name: str) -> NDArray[Any]:
        """A column, not copied into memory."""
        kind, width = self._types[name]
        return read_column(self._path(name), kind, width, self.state.rows.get(name, 0))

    def blocks(self, name: str, rows: int = 1 << 20) -> Iterator[tuple[int, NDArray[Any]]]:
        """(first row, rows) of a column, a block after another."""
        column = self.read(name)
        for first in range(0, len(column), rows):
            yield first, column[first : first + rows]

    def remove_all_but_results(self) -> None:
        """Free the disk of what only the search for duplicates needed."""
        for path in self.folder.iterdir():
            if path.name.removesuffix(".tmp") not in KEPT_FOR_TOKENISING:
                path.unlink()


def read_column(path: Path, kind: str, width: int, rows: int | None = None) -> NDArray[Any]:
    """A column's file as an array [rows] (width 1) or [rows, width], mapped. rows: None for all there are."""
    rows = path.stat().st_size // (np.dtype(kind).itemsize * width) if rows is None else rows
    shape = (rows, width) if width > 1 else (rows,)
    return np.memmap(path, np.dtype(kind), "r", shape=shape) if rows else np.zeros(shape, kind)


def checksum(path: Path) -> str:
    """xxh3-128 of a file, in hex."""
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while data := file.read(READ_BYTES):
            hasher.update(data)
    return str(hasher.hexdigest())
