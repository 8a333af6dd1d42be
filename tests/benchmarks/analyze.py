"""`prism analyze` on two models of random weights: GB/s from a cold and a warm cache, beside the disk's read rate, and peak memory.

    python tests/benchmarks/analyze.py [--work DIR] [--layers 8 --hidden 2048 --dtype bfloat16] [--workers 1 2] [--rank stable] [--rounds 1]

Cold: every weight file's pages are dropped (posix_fadvise) before each pass. The disk's rate is that of reading the same files to their end, cold.
Memory is that of this process (workers=1), its own pages (RssAnon), mapped files apart, beside the size of the largest tensor. The machine's load is
printed, and with rounds the medians: on a machine that does other things the figure to go by is that of processor time (workers=1), which waiting
for a core does not enter.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from own_memory import Peak
from tiny_models import write_tokenizer

from megatron_prism import families
from megatron_prism.analysis.stream import Job, Walker, walk
from megatron_prism.engine import hf

VOCAB = 32_000


def main() -> None:
    """Write, read, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--workers", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=1, help="disk, cold and warm passes, in turns")
    parser.add_argument("--rank", choices=["stable", "effective"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        folders = [write(Path(work) / f"model{seed}", options, seed) for seed in (0, 1)]
        files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
        size = sum(file.stat().st_size for file in files) / 1e9
        print(f"two models of {size / 2:.2f} GB in {options.dtype}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
        job = Job(("a", "b"), tuple(folders), ((0, 1),), (), frozenset({0}), options.rank)
        for workers in options.workers:
            rounds = [one_round(files, size, job, workers) for _ in range(options.rounds)]
            disk, cold, warm, share = (statistics.median(column) for column in zip(*rounds, strict=True))
            rates = f"disk {disk:.2f}, cold {cold:.2f} ({share:.0%} of the disk's), warm {warm:.2f} GB/s"
            print(f"workers={workers}, medians of {options.rounds}: {rates}")
        largest = max(entry.shape[0] * entry.shape[-1] * entry.dtype.itemsize for entry in hf.Reader(folders[0]).entries.values())
        print(f"largest tensor {largest / 2**20:.0f} MiB; {len(Walker(job).entries)} rules")


def one_round(files: list[Path], size: float, job: Job, workers: int) -> tuple[float, float, float, float]:
    """The disk, and analyze from a cold and a warm cache, GB/s; the cold rate's share of the disk's."""
    drop(files)
    disk = size / seconds(lambda: [read(file) for file in files])
    print(f"disk, cold: {disk:.2f} GB/s", flush=True)
    found = {}
    for cache in ("cold", "warm"):
        if cache == "cold":
            drop(files)
        before = time.process_time()
        with Peak() as peak:
            found[cache] = size / seconds(lambda: walk(job, workers, lambda rule, batch: None))
        share = f", {found[cache] / disk:.0%} of the disk's rate" if cache == "cold" else ""
        here = f"; {size / (time.process_time() - before):.2f} GB a second of processor time, own memory +{peak.mib:.1f} MiB"
        print(f"workers={workers} {cache}: {found[cache]:.2f} GB/s{share}{here if workers == 1 else ''}; load {os.getloadavg()[0]:.1f}", flush=True)
    return disk, found["cold"], found["warm"], found["cold"] / disk


def write(folder: Path, options: argparse.Namespace, seed: int) -> Path:
    """A LLaMA of random weights, one tensor at a time."""
    kind, hidden = getattr(torch, options.dtype), options.hidden
    folder.mkdir(parents=True)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": max(1, hidden // 256),
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": options.dtype,
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, VOCAB)
    family, model = families.load(folder)
    plan = [hf.Planned(part.name, part.shape, kind) for entry in family.rules(model) for part in entry.parts(model)]
    random = torch.Generator().manual_seed(seed)
    hf.write_weights(folder, plan, ((item.name, torch.randn(item.shape, generator=random).to(kind)) for item in plan))
    return folder


def drop(files: list[Path]) -> None:
    """Take the files out of the page cache."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(file: Path) -> None:
    """All of a file, 8 MiB at a time."""
    buffer = bytearray(8 << 20)
    with file.open("rb", buffering=0) as opened:
        while opened.readinto(buffer):
            pass


def seconds(work) -> float:
    """How long it took."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
