"""A data set's files: in a folder of yours, or from the Hugging Face hub through its cache; and their rows.

DATA_DIR/TASK.jsonl (or .parquet, .csv)    all rows of a task in one file
DATA_DIR/DATASET/FILE                      as `hf download DATASET --local-dir DATA_DIR/DATASET` writes them

Without a folder the hub's cache is asked first (it needs no network for a pinned revision), then the hub.
Owns: the order of the places, reading jsonl, parquet and csv a row at a time. Refuses: what is in none of them, lines that are no JSON objects.
"""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_prism.errors import UserError
from megatron_prism.evals.sources.rows import Row, json_object

SUFFIXES = (".jsonl", ".parquet", ".csv")
PARQUET_BATCH_ROWS = 64
CSV_FIELD_BYTES = 1 << 24


class HubFiles(NamedTuple):
    """Files of a data set on the Hugging Face hub, at one revision (None: they are in a folder of yours alone)."""

    task: str
    dataset: str
    revision: str | None
    files: Sequence[str]


def find(wanted: HubFiles, data_dir: Path | None) -> list[Path]:
    """The local paths of the files, in order. Errors: UserError that says which file to put where."""
    if data_dir is None:
        if wanted.revision is None:
            raise UserError(f"task {wanted.task} pins no revision of {wanted.dataset}, so its files are read from a folder alone: give data_dir")
        return [_from_hub(wanted, file) for file in wanted.files]
    for suffix in SUFFIXES:
        if (own := data_dir / f"{wanted.task}{suffix}").is_file():
            return [own]
    paths = [data_dir / wanted.dataset / file for file in wanted.files]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"task {wanted.task}: data_dir={data_dir} lacks {', '.join(missing)}. {_advice(wanted, str(data_dir))}")
    return paths


def rows(path: Path, name: str | None = None) -> Iterator[Row]:
    """The rows of a file, by its suffix; one is held at a time. name: what their places begin with; none: the file's own name.

    Errors: UserError for another suffix and for broken lines.
    """
    readers = {".jsonl": _jsonl, ".parquet": _parquet, ".csv": _csv}
    if path.suffix not in readers:
        raise UserError(f"{path} must end in one of {', '.join(SUFFIXES)}")
    return (Row(f"{name or path.name}:{number}", fields) for number, fields in enumerate(readers[path.suffix](path), start=1))


def _from_hub(wanted: HubFiles, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(wanted.dataset, file, repo_type="dataset", revision=wanted.revision))
    except Exception as error:  # a boundary: no network, no such file, a gate, a full disk; the hub's client has a class for each
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"task {wanted.task}: {file} of the data set {wanted.dataset} (revision {wanted.revision}) is not in the Hugging Face cache "
            f"and could not be downloaded: {reason}. {_advice(wanted, 'FOLDER')}"
        ) from None


def _advice(wanted: HubFiles, folder: str) -> str:
    if wanted.revision is None:
        return f"Put them there, or all rows into {folder}/{wanted.task}.jsonl"
    return (
        f"Where there is network: `hf download {wanted.dataset} {' '.join(wanted.files)} --repo-type dataset --revision {wanted.revision} "
        f"--local-dir {folder}/{wanted.dataset}`; or put all rows into {folder}/{wanted.task}.jsonl; then give {folder} as data_dir"
    )


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            yield json_object(line, f"{path}:{number}", "an unfinished download, or another format?")


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(path).iter_batches(PARQUET_BATCH_ROWS):
            yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is no parquet file: {error}; an unfinished download?") from None


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(CSV_FIELD_BYTES)
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file)
