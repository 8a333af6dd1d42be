"""N-gram files: the word n-grams of an evaluation task, one JSON object a line, and the table of them that documents are looked up in.

    {"format": "prism-ngrams", "version": 1, "task": "sums", "n": 13, "normalisation": "words-2", "form": "plain", "questions": 100, "ngrams": 2310}
    {"question": "sums/17", "ngram": "natalia sold clips to 48 of her friends in april and then she"}
or, with "form": "hashed", for tasks whose text must not be passed on:
    {"question": "sums/17", "words": 13, "hash": "<32 hex digits>"}

hash: the n-gram's 64-bit hash (words.sequence_hash), then xxh3-64 of its words joined by one space. An n-gram may have fewer than n words: a question
shorter than n is one n-gram. Both numbers must agree before a document counts as contaminated.

Owns: the format, the table. Refuses: other formats, versions and normalisations, files that are cut short, folders without such files.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_prism import artifact
from megatron_prism.data_prep.cleaning.words import NORMALISATION, Flat, check_hash, hash_words, ngrams, sequence_hash
from megatron_prism.data_prep.cleaning.words import words as words_of
from megatron_prism.errors import UserError

FORMAT = "prism-ngrams"
VERSION = 1
MAX_TASKS = 200
FILTER_BITS = 22


class Ngram(NamedTuple):
    """One line of a file. text: None where the file is hashed."""

    question: str
    words: int
    hash: int
    check: int
    text: str | None


class NgramFile(NamedTuple):
    """A whole file."""

    path: str
    task: str
    n: int
    ngrams: list[Ngram]


class Hit(NamedTuple):
    """Words first .. first + words - 1 of a row are the n-gram `entry` of the table."""

    row: int
    first: int
    words: int
    entry: int


def ngram_of(question: str, words: list[str], hashed: bool = False) -> Ngram:
    """The words as one n-gram of a question."""
    return Ngram(question, len(words), sequence_hash(hash_words(words)), check_hash(words), None if hashed else " ".join(words))


def write_ngrams(path: Path, task: str, n: int, questions: int, found: Iterable[Ngram]) -> Path:
    """Write one task's n-grams; hashed where any of them has no text."""
    lines = list(found)
    form = "hashed" if any(line.text is None for line in lines) else "plain"
    header = {"format": FORMAT, "version": VERSION, "task": task, "n": n, "normalisation": NORMALISATION, "form": form}
    rows: list[dict[str, Any]] = [{**header, "questions": questions, "ngrams": len(lines)}]
    for line in lines:
        hashed = {"words": line.words, "hash": f"{line.hash:016x}{line.check:016x}"}
        rows.append({"question": line.question, **(hashed if form == "hashed" else {"ngram": line.text})})
    artifact.write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def find_files(paths: Iterable[Path]) -> list[Path]:
    """The files of paths that are files or folders of *.jsonl. Errors: UserError for what is not there."""
    found: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not inside or not all(file.is_file() for file in inside):
            raise UserError(f"cleaning.contamination.ngrams: {path} is no n-gram file and no folder of *.jsonl; make them as docs/cleaning.md says")
        if path.is_dir() and (path / artifact.PROVENANCE).is_file():
            artifact.require(path)
        found += inside
    return list(dict.fromkeys(found))


def read_ngrams(path: Path) -> NgramFile:
    """Read a file. Errors: UserError naming the line that is none of this format."""
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        header = _header(path, json.loads(lines[0]))
        found = [_read_line(path, number, line, header["form"]) for number, line in enumerate(lines[1:], 2)]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its first line is no header of an n-gram file ({type(error).__name__}: {error}); make the file again") from None
    if len(found) != header["ngrams"]:
        raise UserError(f"{path} holds {len(found)} n-grams, its first line says {header['ngrams']}: it was cut short or changed; make it again")
    return NgramFile(str(path), str(header["task"]), int(header["n"]), found)


def _header(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    wanted = {"format": FORMAT, "normalisation": NORMALISATION}
    if not isinstance(header, dict) or any(header.get(key) != value for key, value in wanted.items()):
        raise UserError(f"{path} does not begin with a header of {wanted}: it is no n-gram file that this version reads; make it again")
    if header["version"] > VERSION:
        raise UserError(f"{path} has version {header['version']}, this version reads up to {VERSION}; upgrade megatron-prism")
    if header["form"] not in ("plain", "hashed"):
        raise ValueError(f"form {header['form']!r}")
    return header


def _read_line(path: Path, number: int, data: str, form: str) -> Ngram:
    try:
        line = json.loads(data)
        if form == "plain":
            found = words_of(line["ngram"])
            if not found or found != line["ngram"].split(" "):
                raise ValueError(f"an n-gram that is not in the normalised form {NORMALISATION}, {' '.join(found)!r}")
            return ngram_of(line["question"], found)
        if len(line["hash"]) != 32:
            raise ValueError(f"a hash of {len(line['hash'])} digits, not 32")
        if type(line["words"]) is not int or line["words"] < 1:
            raise ValueError(f"words={line['words']!r}, not a count of 1 or more")
        return Ngram(line["question"], line["words"], int(line["hash"][:16], 16), int(line["hash"][16:], 16), None)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}, line {number} is no line of an n-gram file ({type(error).__name__}: {error}); make the file again") from None


class _Length(NamedTuple):
    """The n-grams of one number of words, sorted by hash; near: which values of a hash's lowest bits occur at all."""

    hashes: NDArray[np.uint64]
    entries: NDArray[np.int64]
    near: NDArray[np.bool_]


class Table(NamedTuple):
    """All n-grams of all files, as the workers need them: entry e is of tasks[task[e]], and its words' xxh3-64 is check[e]."""

    tasks: tuple[str, ...]
    lengths: dict[int, _Length]
    task: NDArray[np.uint8]
    check: NDArray[np.uint64]

    def find(self, flat: Flat) -> Iterator[Hit]:
        """Where the rows hold an n-gram, by hash alone: the caller compares `check`. By length, then by place."""
        for words, table in self.lengths.items():
            found, starts = ngrams(flat, words)
            chosen = np.flatnonzero(table.near[found & np.uint64(len(table.near) - 1)])
            found, starts = found[chosen], starts[chosen]
            first = np.searchsorted(table.hashes, found, "left")
            last = np.searchsorted(table.hashes, found, "right")
            for place in np.flatnonzero(last > first):
                row = int(np.searchsorted(flat.offsets, starts[place], "right")) - 1
                for entry in table.entries[first[place] : last[place]]:
                    yield Hit(row, int(starts[place] - flat.offsets[row]), words, int(entry))


def make_table(files: list[NgramFile]) -> Table:
    """The table of several files, each a task. Errors: UserError for two files of one task, or too many."""
    tasks = tuple(file.task for file in files)
    if len(set(tasks)) < len(tasks) or len(tasks) > MAX_TASKS:
        raise UserError(f"n-gram files must be of different tasks, at most {MAX_TASKS}; got {', '.join(tasks)}")
    every = [(number, line) for number, file in enumerate(files) for line in file.ngrams]
    hashes = np.array([line.hash for _, line in every], np.uint64)
    sizes = np.array([line.words for _, line in every], np.int64)
    lengths = {}
    for size in sorted(set(sizes.tolist())):
        entries = np.flatnonzero(sizes == size)
        entries = entries[np.argsort(hashes[entries], kind="stable")]
        near = np.zeros(1 << FILTER_BITS, bool)
        near[hashes[entries] & np.uint64(len(near) - 1)] = True
        lengths[size] = _Length(hashes[entries], entries, near)
    return Table(tasks, lengths, np.array([number for number, _ in every], np.uint8), np.array([line.check for _, line in every], np.uint64))
