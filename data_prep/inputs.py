"""The inputs of a source, cut into chunks of about one MiB of text that workers turn into tokens independently.

Chunks depend on the input alone, never on workers or on where an earlier run stopped: each begins where the one before it ended, so a run that was
killed goes on from any chunk boundary. Plain .jsonl is read by the workers themselves; compressed files, parquet and functions are streamed by the
parent, once. Memory: a chunk, or the largest single document.

Owns: finding files, fingerprints, cutting. Refuses: patterns without a match, unknown suffixes, parquet without the column, damaged files.
"""

import hashlib
import importlib
import importlib.util
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import xxhash

from megatron_prism.data_prep import files
from megatron_prism.data_prep.documents import UTF8_BOM, Oversized, decompress
from megatron_prism.data_prep.files import Found
from megatron_prism.data_prep.settings import SourceConfig
from megatron_prism.errors import UserError

CHUNK_BYTES = 1 << 20
CHUNK_RECORDS = 4096
PARQUET_BATCH_ROWS = 512
PARQUET_BATCH_BYTES = 8 << 20
SUFFIX_KINDS = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".txt": "text", ".md": "text"}
COMPRESSED = (".gz", ".zst")
COMPRESSED_WEIGHT = 16
"""A small compressed text file counts as so many times its bytes in a group of files."""


class Input(NamedTuple):
    """One file, or one function (kind "function", whose path is its name). fingerprint: empty where it was not taken."""

    path: str
    kind: str
    bytes: int
    fingerprint: str


class Position(NamedTuple):
    """A chunk boundary: which input, and where in it (bytes of uncompressed lines, or rows, or records)."""

    input: int
    offset: int


START = Position(0, 0)


class Chunk(NamedTuple):
    """A piece of work. kind and payload are for `documents.read_chunk`; input_bytes: the share of the input's size, for the progress bar;
    digest: of all records of a function so far, to see on resuming that it yields the same again."""

    start: Position
    end: Position
    kind: str
    payload: Any
    input_bytes: int
    digest: str | None = None


def find_inputs(source: SourceConfig) -> list[Input]:
    """The inputs of a source with their fingerprints. Errors: UserError as for `list_inputs`."""
    return fingerprinted(list_inputs(source))


def list_inputs(source: SourceConfig) -> list[Input]:
    """The inputs of a source in order: patterns as written, files of a pattern sorted; files have no fingerprints yet, for nothing is read.

    Errors: UserError for what is not there or unknown.
    """
    if source.function is not None:
        return [_function_input(source)]
    found = dict.fromkeys(file for pattern in source.paths for file in _expand(pattern, source))
    return [_file_input(file, source) for file in found]


def fingerprinted(found: Sequence[Input]) -> list[Input]:
    """The same inputs with fingerprints."""
    with ThreadPoolExecutor(max_workers=8) as pool:  # reading a few blocks of many files is all waiting
        return list(pool.map(lambda each: each if each.fingerprint else each._replace(fingerprint=files.fingerprint(each.path, each.bytes)), found))


def changed(found: Sequence[Input]) -> list[str]:
    """The files that are others now than their fingerprints say, whatever stores said before in this process."""
    listed = [each for each in found if each.kind != "function"]
    with ThreadPoolExecutor(max_workers=8) as pool:
        verdicts = list(pool.map(lambda each: files.is_changed(each.path, each.bytes, each.fingerprint), listed))
    return [each.path for each, is_changed in zip(listed, verdicts, strict=True) if is_changed]


def _expand(pattern: str, source: SourceConfig) -> list[Found]:
    found, is_folder = files.expand(pattern)
    if is_folder:
        found = [file for file in found if source.kind or _suffix_kind(file.path)]
    if not found:
        raise UserError(f"source {source.name!r}: {pattern!r} matches no file (known: {', '.join(SUFFIX_KINDS)}; others need kind); check the path")
    return found


def _suffix_kind(path: str) -> str | None:
    suffixes = [suffix for suffix in PurePosixPath(path).suffixes if suffix not in COMPRESSED]
    return SUFFIX_KINDS.get(suffixes[-1]) if suffixes else None


def _file_input(file: Found, source: SourceConfig) -> Input:
    kind = source.kind or _suffix_kind(file.path)
    if kind is None:
        raise UserError(f"source {source.name!r}: {file.path} has no known suffix ({', '.join(SUFFIX_KINDS)}, with .gz or .zst); set kind")
    return Input(file.path, kind, file.bytes, "")


def fingerprint(path: Path) -> str:
    """What tells a local file apart from a changed one (`files.fingerprint`)."""
    return files.fingerprint(str(path), path.stat().st_size)


def _function_input(source: SourceConfig) -> Input:
    assert source.function is not None
    place = inspect.getsourcefile(inspect.unwrap(load_function(source.function)))
    hasher = hashlib.sha256(json.dumps(source.arguments, sort_keys=True).encode())
    hasher.update(Path(place).read_bytes() if place else b"")
    return Input(source.function, "function", 0, hasher.hexdigest()[:32])


def load_function(name: str) -> Callable[..., Iterable[Any]]:
    """The function of "package.module:function" or "path/to/file.py:function". Errors: UserError when it cannot be found."""
    place, colon, attribute = name.rpartition(":")
    if not colon:
        raise UserError(f"function={name!r} must read package.module:function or path/to/file.py:function")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        return getattr(module, attribute)
    except (ImportError, FileNotFoundError, AttributeError) as error:
        raise UserError(
            f"function={name!r} cannot be loaded ({error}); give path/to/file.py:function, or package.module:function of a package that is "
            "installed or on PYTHONPATH (the current folder is not: PYTHONPATH=. prism ...)"
        ) from None


def chunks(source: SourceConfig, inputs: list[Input], start: Position = START, digest: str | None = None, stop: int | None = None) -> Iterator[Chunk]:
    """The chunks of a source from a boundary on, to the input `stop`. digest: of the records before `start`, where a function yields them."""
    number, offset = start
    stop = len(inputs) if stop is None else stop
    while number < stop:
        found = inputs[number]
        if found.kind == "text" and source.documents == "file":
            yield (group := _file_group(inputs, number, stop))
            number = group.end.input
            continue
        if offset == 0 and source.sample is None and _is_small(found):  # a sample's limits are those of one file's pattern
            yield (group := _small_group(inputs, number, stop))
            number = group.end.input
            continue
        if found.kind == "jsonl" and not found.path.endswith(COMPRESSED):
            yield from _line_ranges(found, number, offset)
        elif found.kind == "parquet":
            yield from _parquet(found, number, offset, source)
        elif found.kind == "function":
            yield from _function(source, number, offset, digest)
        else:
            yield from _stream(found, number, offset, "lines" if found.kind == "jsonl" else "paragraphs", source.max_record_bytes)
        number, offset = number + 1, 0


def _line_ranges(found: Input, number: int, offset: int) -> Iterator[Chunk]:
    for start in range(offset, max(found.bytes, 1), CHUNK_BYTES):  # an empty file is a chunk too, which ends where the next file begins
        stop = min(start + CHUNK_BYTES, found.bytes)
        end = Position(number, stop) if stop < found.bytes else Position(number + 1, 0)
        yield Chunk(Position(number, start), end, "range", (found.path, start, stop), stop - start)


def _file_group(inputs: list[Input], number: int, stop: int) -> Chunk:
    last, size, weight = number, 0, 0
    while last < stop and inputs[last].kind == "text" and weight < CHUNK_BYTES and last - number < CHUNK_RECORDS:
        size += inputs[last].bytes
        weight += inputs[last].bytes * (COMPRESSED_WEIGHT if inputs[last].path.endswith(COMPRESSED) else 1)
        last += 1
    return Chunk(Position(number, 0), Position(last, 0), "files", [found.path for found in inputs[number:last]], size)


def _is_small(found: Input) -> bool:
    return found.kind == "jsonl" and not found.path.endswith(COMPRESSED) and found.bytes < CHUNK_BYTES // 4


def _small_group(inputs: list[Input], number: int, stop: int) -> Chunk:
    """Whole small files of JSON lines: a chunk has its price, and tens of thousands of files would pay it each."""
    last, size = number, 0
    while last < stop and _is_small(inputs[last]) and size < CHUNK_BYTES and last - number < CHUNK_RECORDS:
        size, last = size + inputs[last].bytes, last + 1
    return Chunk(Position(number, 0), Position(last, 0), "line_files", [(found.path, 0, found.bytes) for found in inputs[number:last]], size)


def _stream(found: Input, number: int, offset: int, kind: str, limit: int) -> Iterator[Chunk]:
    """Whole lines, or whole paragraphs, of a file that can only be read from its start; of those beyond the limit a little more than it."""
    with files.open_file(found.path) as raw, decompress(raw, found.path) as file:
        _skip(found, file, offset)
        reported = raw.tell()
        while data := file.read(CHUNK_BYTES):
            data, skipped = _until_end_of_line(data, file, limit) if kind == "lines" else _until_blank_line(data, file, limit)
            start, offset = offset, offset + len(data) + skipped
            payload = data.removeprefix(UTF8_BOM) if start == 0 else data
            yield Chunk(Position(number, start), Position(number, offset), kind, payload, raw.tell() - reported)
            reported = raw.tell()
    yield Chunk(Position(number, offset), Position(number + 1, 0), kind, b"", 0)  # where the file ends is known only now: this carries the boundary


def _skip(found: Input, file: BinaryIO, offset: int) -> None:
    skipped = 0
    while skipped < offset:
        part = len(file.read(min(CHUNK_BYTES, offset - skipped)))
        if part == 0:
            raise UserError(f"{found.path} ends at byte {skipped}, but a run stopped at byte {offset} of it: it was changed; use a new output")
        skipped += part


def _until_end_of_line(data: bytes, file: BinaryIO, limit: int) -> tuple[bytes, int]:
    """The data with the rest of its last line, and how many bytes of that line were left out since it is beyond the limit."""
    if not data.endswith(b"\n"):
        data += file.readline(limit + 1)
    skipped = 0
    while not data.endswith(b"\n") and (more := file.readline(CHUNK_BYTES)):
        skipped += len(more)
        if more.endswith(b"\n"):
            break
    return data, skipped


def _until_blank_line(data: bytes, file: BinaryIO, limit: int) -> tuple[bytes, int]:
    """The same for a paragraph, which ends at a blank line."""
    parts, size, skipped, is_blank = [data], 0, 0, not data[data.rfind(b"\n") + 1 :].strip()
    while more := file.readline(CHUNK_BYTES):
        if size <= limit:
            parts.append(more)
            size += len(more)
        else:
            skipped += len(more)
        is_blank = is_blank and not more.strip()
        if more.endswith(b"\n"):
            if is_blank:
                break
            is_blank = True
    return b"".join(parts), skipped


def _parquet(found: Input, number: int, offset: int, source: SourceConfig) -> Iterator[Chunk]:
    rows = _parquet_rows(found, offset, source)
    yield from _records(rows, number, offset, found.bytes, source.max_record_bytes)


def check_tables(source: SourceConfig, found: Sequence[Input]) -> None:
    """All parquet files have the source's columns: one of thousands that drifted is named before hours of work. Errors: UserError."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(lambda each: _open_parquet(each, source).close(), (each for each in found if each.kind == "parquet")))


def _open_parquet(found: Input, source: SourceConfig) -> Any:
    """An open file that has the source's columns. Errors: UserError naming the file and what it has instead."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(files.open_table(found.path), pre_buffer=False, buffer_size=CHUNK_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{found.path} is no readable parquet file ({_one_line(error)}); fetch it again") from None
    for column in source.columns:
        _check_column(found, file.schema_arrow, column, column in source.text_columns)
    return file


def _parquet_rows(found: Input, offset: int, source: SourceConfig) -> Iterator[tuple[Any, int, float]]:
    """(record, its size, share of the file read): bytes for one column (decoded by the worker), dicts where a format joins several."""
    file = _open_parquet(found, source)
    total, row = max(1, file.metadata.num_rows), 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if row + rows <= offset:
            row += rows
            continue
        row_bytes = max(1, file.metadata.row_group(group).total_byte_size // max(1, rows))
        batch_rows = max(1, min(PARQUET_BATCH_ROWS, PARQUET_BATCH_BYTES // row_bytes))
        for batch in _batches(found, file, group, batch_rows, source.columns):
            values = [_values(batch.column(column)) for column in source.columns]
            for record in zip(*values, strict=True):
                row += 1
                if row > offset:
                    yield (dict(zip(source.columns, record, strict=True)), sum(map(_size, record)), row / total)


def _batches(found: Input, file: Any, group: int, rows: int, columns: list[str]) -> Iterator[Any]:
    import pyarrow as pa

    try:
        yield from file.iter_batches(rows, row_groups=[group], columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{found.path} cannot be read in row group {group} ({_one_line(error)}): it is damaged, or was changed; fetch it again"
        ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _values(column: Any) -> list[Any]:
    """Texts as bytes (decoded by the worker, which counts bad ones); turns, numbers and such as they are."""
    import pyarrow as pa

    return list((column.cast(pa.large_binary()) if _is_text(column.type) else column).to_pylist())


def _size(value: Any) -> int:
    """The bytes of its texts, in UTF-8."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, list | dict):
        return sum(map(_size, value.values() if isinstance(value, dict) else value))
    return 0


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return any(check(kind) for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary))


def _check_column(found: Input, schema: Any, column: str, must_be_text: bool) -> None:
    if column not in schema.names:
        raise UserError(f"{found.path} has no column {column!r}; it has {', '.join(schema.names)}: set column or format")
    kind = schema.field(column).type
    if must_be_text and not _is_text(kind):
        raise UserError(f"{found.path}: column {column!r} holds {kind}, not text; choose a text column")


def _records(rows: Iterator[tuple[Any, int, float]], number: int, offset: int, input_bytes: int, limit: int) -> Iterator[Chunk]:
    start, records, size, reported = offset, [], 0, 0
    for record, record_bytes, share in rows:
        fits = record_bytes <= limit
        records.append(record if fits else Oversized(record_bytes))
        offset, size = offset + 1, size + (record_bytes if fits else 0)
        if size >= CHUNK_BYTES or len(records) >= CHUNK_RECORDS:
            done = int(share * input_bytes)
            yield Chunk(Position(number, start), Position(number, offset), "records", records, done - reported)
            start, records, size, reported = offset, [], 0, done
    yield Chunk(Position(number, start), Position(number + 1, 0), "records", records, input_bytes - reported)


def _function(source: SourceConfig, number: int, offset: int, digest: str | None) -> Iterator[Chunk]:
    assert source.function is not None
    hasher, start, records, size = xxhash.xxh3_64(), offset, [], 0
    place = 0
    for record in load_function(source.function)(**source.arguments):
        text = record if isinstance(record, str) else json.dumps(record, sort_keys=True, default=str)
        hasher.update(text.encode("utf-8", "surrogatepass") + b"\0")
        place += 1
        if place <= offset:
            _check_digest(source, place == offset, hasher.hexdigest(), digest)
            continue
        record_bytes = _size(record)
        fits = record_bytes <= source.max_record_bytes
        records.append(record if fits else Oversized(record_bytes))
        size += record_bytes if fits else 0
        if size >= CHUNK_BYTES or len(records) >= CHUNK_RECORDS:
            yield Chunk(Position(number, start), Position(number, place), "records", records, 0, hasher.hexdigest())
            start, records, size = place, [], 0
    if place < offset:
        _check_digest(source, True, "", digest)
    yield Chunk(Position(number, start), Position(number + 1, 0), "records", records, 0, hasher.hexdigest())


def _check_digest(source: SourceConfig, there: bool, found: str, digest: str | None) -> None:
    if there and found != digest:
        raise UserError(
            f"source {source.name!r}: {source.function} yields other records than in the run that is taken up; "
            "it must yield the same each time (seed it): mend it and use a new output"
        )
