"""Speed of cleaning: documents and MB of text per second of one core, for each part of the pre-pass and for telling duplicates.

    OMP_NUM_THREADS=1 python tests/benchmarks/cleaning.py --work FOLDER [--megabytes 30] [--runs 3] [--ngrams 100000] [--documents 2000000]

The corpus is data_prep.py's (Python files and texts installed with the interpreter), already in memory; seconds are of this process's CPU clock,
for other work may share the cores. Telling duplicates: random signatures of --documents documents, one in ten a copy, read from disk.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from data_prep import _texts, make_corpus
from megatron_prism.data_prep.cleaning.columns import Columns, column_types
from megatron_prism.data_prep.cleaning.duplicates import Corpus, find_duplicates
from megatron_prism.data_prep.cleaning.filters import Filters
from megatron_prism.data_prep.cleaning.ngrams import NgramFile, make_table, ngram_of
from megatron_prism.data_prep.cleaning.scan import Plan, scan_texts
from megatron_prism.data_prep.inputs import Position
from megatron_prism.data_prep.tokenizer import limit_threads

NEAR = (5, 128, 16)
CHUNK_BYTES = 1 << 20


def main() -> None:
    """Measure and print Markdown rows."""
    arguments = _arguments()
    limit_threads()
    arguments.work.mkdir(parents=True, exist_ok=True)
    chunks = _chunks(_texts(make_corpus(arguments.work / f"corpus_{arguments.megabytes}.jsonl", arguments.megabytes)))
    documents, size = sum(map(len, chunks)), sum(len(text.encode()) for chunk in chunks for text in chunk) / 1e6
    print(f"{documents:,} documents, {size:.1f} MB\n\n| part | documents/s | MB/s |\n| --- | ---: | ---: |")
    for name, work in _parts(arguments.ngrams).items():
        seconds = statistics.median(_seconds(work, chunks) for _ in range(arguments.runs))
        print(f"| {name} | {documents / seconds:,.0f} | {size / seconds:.1f} |", flush=True)
    _telling(arguments.documents)


def _chunks(texts: list[str]) -> list[list[str]]:
    chunks: list[list[str]] = [[]]
    room = CHUNK_BYTES
    for text in texts:
        chunks[-1].append(text)
        room -= len(text)
        if room <= 0:
            chunks, room = [*chunks, []], CHUNK_BYTES
    return chunks


def _parts(count: int) -> dict[str, Callable[[list[str]], object]]:
    generator = np.random.default_rng(0)
    lines = [ngram_of("t/0", [f"w{word}" for word in generator.integers(0, 50_000, 13)]) for _ in range(count)]
    table = make_table([NgramFile("t", "t", 13, lines)])
    filters = Filters(10, 10**6, 2, 10**6, 0.9, 0.9)
    plans = {
        "exact duplicates: hash": Plan(True, None, None, False),
        "near duplicates: words, 5-grams, MinHash of 128": Plan(False, NEAR, None, False),
        f"contamination: words, 13-grams, {count:,} to look for": Plan(False, None, table, False),
        "all three": Plan(True, NEAR, table, False),
    }
    return {"filters, all six": lambda texts: [filters.dropped_by(text) for text in texts]} | {
        name: partial(scan_texts, plan=plan) for name, plan in plans.items()
    }


def _seconds(work: Callable[[list[str]], object], chunks: list[list[str]]) -> float:
    started = time.process_time()
    for chunk in chunks:
        work(chunk)
    return time.process_time() - started


def _telling(documents: int) -> None:
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        columns = Columns(Path(folder), column_types(Plan(True, NEAR, None, False)))
        same = np.arange(documents)
        copies = generator.random(documents) < 0.1
        same[copies] = generator.integers(0, documents, copies.sum())
        draw = generator.integers(0, 1 << 63, (documents, 2), dtype=np.uint64)
        columns.append("code", np.zeros(documents, np.uint8))
        columns.append("exact", draw[same])
        for band in range(NEAR[2]):
            columns.append(f"band_{band:02d}", draw[same, 0] ^ np.uint64(band))
        columns.append("low", generator.integers(0, 256, (documents, NEAR[1]), dtype=np.uint8)[same])
        columns.commit(Position(1, 0), True, None, 0)
        for name, exact, bands in (("exact", True, 0), ("near, 16 bands", False, NEAR[2])):
            for memory in (4.0, documents * 30 / 2**30):
                started = time.process_time()
                verdicts, _ = find_duplicates(Corpus([columns]), exact, bands, 0.8, memory * 2**30)
                seconds = time.process_time() - started
                assert (verdicts > 0).sum() == documents - len(np.unique(same)), "a planted copy was missed, or something else was taken for one"
                print(f"| telling {name}, {documents:,} documents, {memory:.2f} GiB | {documents / seconds:,.0f} | |", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the corpus")
    parser.add_argument("--megabytes", type=int, default=30)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--ngrams", type=int, default=100_000, help="13-grams to look for")
    parser.add_argument("--documents", type=int, default=2_000_000, help="of the random signatures")
    return parser.parse_args()


if __name__ == "__main__":
    main()
