"""How long a sampler takes to start, what it keeps in memory, and how fast it says where the next sample lies.

    python tests/benchmarks/sampler.py [--million-documents 30] [--tokens 900] [--seq 8192] [--samples 50000] [--one-source]
    python tests/benchmarks/sampler.py --first-read [--gigabytes 1]

Index files of the 11 sources of the paper's mix MCS, documents in proportion to its weights (--one-source: all in one), geometric lengths; no tokens,
which a sampler never reads. Each measurement is a process of its own:

    start     from the index files to the first global batch (128 samples) at sample 0, and at the middle of the run
    next      the mean over --samples in a row from the middle on, and the longest
    replan    the same start, with a history of three plans of which the last is the blend's
    --first-read   instead of all this: what a sample waits for the checksum of a block that nobody has read yet, by the size of blocks, from a file
                   that lies in the page cache, and what the checksums of a terabyte take in a manifest
    memory    what Python and numpy held at most, mapped files apart (tracemalloc), and the process's own pages (RssAnon) at the end above the imports
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from own_memory import own_mib

SOURCES = {"dclm": 5, "chat": 5, "nemotron": 10, "mot_math": 7, "megamath": 20, "mot_code": 3, "ocr2": 10, "refincode": 13.75, "stack": 13.75}
SOURCES |= {"openthoughts": 7.75, "mot_science": 4.75}
SHARD_DOCUMENTS, GLOBAL_BATCH = 1_000_000, 128


def main() -> None:
    """Write the index files, measure in processes of their own, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--million-documents", type=float, default=30)
    parser.add_argument("--tokens", type=int, default=900, help="a document on average")
    parser.add_argument("--seq", type=int, default=8192)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--one-source", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--first-read", action="store_true")
    parser.add_argument("--gigabytes", type=float, default=1)
    options = parser.parse_args()
    if options.first_read:
        first_read(int(options.gigabytes * 1e9))
        return
    if options.measure:
        print(json.dumps(measure(options.measure, options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        weights = {"all": 100.0} if options.one_source else SOURCES
        documents = {name: round(options.million_documents * 1e6 * weight / 100) for name, weight in weights.items()}
        for name, count in documents.items():
            write_indices(Path(folder) / name, count, options.tokens)
        total = sum(documents.values())
        print(f"{len(documents)} sources, {total:,} documents, about {total * options.tokens / 1e9:.1f} G tokens")
        rounds = [child(folder, kind) for kind in ("start", "start", "start", "middle", "middle", "middle", "replan", "memory")]
    for kind in ("start", "middle", "replan"):
        times = ", ".join(f"{found['seconds']:.2f} ({found['core']:.2f})" for found in rounds if found["kind"] == kind)
        print(f"{kind:<8} {times} s to the first {GLOBAL_BATCH} samples (of the core)")
    for found in (found for found in rounds if found["kind"] == "middle"):
        print(f"next     {1e3 * found['next']:.4f} ms each ({1e3 * found['next_core']:.4f} of the core), {1e3 * found['worst']:.0f} ms at most")
    memory = {name: rounds[-1][name] / 1e6 for name in ("peak", "kept", "pages")}
    print(f"memory   {memory['peak']:.0f} MB at most, {memory['kept']:.0f} MB kept; pages {memory['pages']:.0f} MB")


def first_read(size: int, samples: int = 200) -> None:
    """The wait for a checksum at first read, for blocks of several sizes."""
    from megatron_prism.data_prep.manifest import BlockHasher, Manifest, ReadCheck, Shard

    with tempfile.TemporaryDirectory() as folder:
        data, place = np.random.default_rng(0).bytes(size), Path(folder)
        (place / "shard.bin").write_bytes(data)
        for block_bytes in (1 << 26, 1 << 24, 1 << 22, 1 << 20, 1 << 18, 1 << 16):
            hasher = BlockHasher(block_bytes)
            hasher.update(data)
            shard = Shard("shard", 1, size // 4, size, 0, "", hasher.blocks())
            check = ReadCheck(Manifest(place, "s", "train", "", 100_000, 0, "int32", 0, (shard,), block_bytes=block_bytes))
            chosen = np.random.default_rng(1).permutation(len(shard.blocks))[:samples]
            begun = time.perf_counter()
            for block in chosen.tolist():
                check.check(0, block * block_bytes, block * block_bytes + 1)
            wait = (time.perf_counter() - begun) / len(chosen)
            record = len(json.dumps({"blocks": shard.blocks}, indent=1)) / size * 1e12
            print(f"{block_bytes >> 10:>6} KiB   {1e3 * wait:8.3f} ms a new block   {record / 1e6:8.1f} MB of manifest a TB")


def child(folder: str, kind: str) -> dict[str, float]:
    """One measurement in a fresh process."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--measure"]
    command = [sys.executable, __file__, *arguments, "--measure", f"{folder}:{kind}"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)


def write_indices(folder: Path, documents: int, mean: int) -> None:
    """The .idx files of a source."""
    from megatron_prism.data_prep import shards

    folder.mkdir()
    generator = np.random.default_rng(documents)
    for number, start in enumerate(range(0, documents, SHARD_DOCUMENTS)):
        lengths = generator.geometric(1 / mean, min(SHARD_DOCUMENTS, documents - start)).astype(np.int32)
        (folder / f"shard_{number:05d}.idx").write_bytes(shards.index_bytes(lengths, "int32"))


def measure(place: str, options: argparse.Namespace) -> dict[str, object]:
    """One measurement, in this process."""
    from megatron_prism.data_prep.history import History, Segment
    from megatron_prism.data_prep.sampler import Sampler

    folder, _, kind = place.partition(":")
    manifests = read_manifests(Path(folder))
    weights = {name: float(SOURCES.get(name, 100)) for name in manifests}
    middle = int(options.million_documents * 1e6 * options.tokens / options.seq / 2)
    plan: object = list(weights.values())
    if kind == "replan":
        plans = dict.fromkeys(weights, 1.0), dict.fromkeys(list(weights)[::2], 1.0), weights
        plan = History([Segment(first, each) for first, each in zip((0, middle // 3, middle), plans, strict=True)])
    pages = own_mib()
    if kind == "memory":
        tracemalloc.start()
    clock, core = time.perf_counter(), time.process_time()
    sampler = Sampler([each.document_lengths() for each in manifests.values()], plan, options.seq, 1, list(weights))  # type: ignore
    first = 0 if kind == "start" else middle
    for index in range(first, first + GLOBAL_BATCH):
        sampler.sample(index)
    found: dict[str, object] = {"kind": kind, "seconds": time.perf_counter() - clock, "core": time.process_time() - core}
    if kind == "memory":
        for index in range(first, first + options.samples // 10):
            sampler.sample(index)
        kept, peak = tracemalloc.get_traced_memory()
        found |= {"peak": peak, "kept": kept, "pages": (own_mib() - pages) * 2**20}
    return found | (in_a_row(sampler, first, options.samples) if kind == "middle" else {})


def in_a_row(sampler: "object", first: int, count: int) -> dict[str, object]:
    """Seconds a sample, on average by the clock and of the core, and the longest."""
    times, core = np.zeros(count), time.process_time()
    for number in range(count):
        begun = time.perf_counter()
        sampler.sample(first + number)  # type: ignore[attr-defined]
        times[number] = time.perf_counter() - begun
    return {"next": times.mean(), "next_core": (time.process_time() - core) / count, "worst": times.max()}


def read_manifests(folder: Path) -> "dict[str, object]":
    """Manifests as prep would have left them, as far as a sampler needs them."""
    from megatron_prism.data_prep import shards
    from megatron_prism.data_prep.manifest import Manifest, Shard

    found: dict[str, object] = {}
    for source in sorted(folder.iterdir()):
        parts = []
        for file in sorted(source.glob("*.idx")):
            lengths = shards.read_index(file).lengths
            parts.append(Shard(file.stem, len(lengths), int(lengths.sum(dtype=np.int64)), 0, 0, "", ()))
        found[source.name] = Manifest(source, source.name, "train", "", 100_000, 0, "int32", 0, tuple(parts))
    return found


if __name__ == "__main__":
    main()
