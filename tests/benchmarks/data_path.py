"""How fast training samples are read, against what a GPU eats.

    python tests/benchmarks/data_path.py [--seq 8192] [--million-tokens 100] [--steps 40]

Shards of random tokens, 4 bytes each, documents log-normal around 800 tokens (sigma 1.2). One thread, files in the page cache:

    checked   every block of the shards was compared with its checksum before
    first     the first samples of a run: each new block of 1 MiB that a document lies in is read and hashed before the document is
    step      what a training step waits, per step, with the thread that reads ahead: the "GPU" sleeps for as long as it needs for a sample

An H200 eats 40,000 tokens/s of 8 layers of LLaMA-3.1-8B in bf16 (docs/benchmarks.md), and 16,000 of all its layers in FP8.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

GPU_TOKENS_PER_SECOND = 40_000
VOCAB, SHARDS = 128_256, 4


def main() -> None:
    """Write the shards, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq", type=int, default=8192)
    parser.add_argument("--million-tokens", type=int, default=100)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--median-document", type=int, default=800)
    options = parser.parse_args()

    import torch

    from megatron_prism.data_prep.blend import load_blend
    from megatron_prism.engine.data import SampleReader

    with tempfile.TemporaryDirectory() as folder:
        blend = load_blend(write_blend_of(Path(folder), options.million_tokens * 1_000_000, options.median_document))
        reader = SampleReader(blend, "train", options.seq, mask_end_of_document=True)
        reader.sampler.sample(0)  # the order of the documents, once an epoch
        report("first", *rate(reader, range(8)), options.seq)
        for check in (source.checks for source in reader.readers):
            for number, shard in enumerate(check.manifest.shards):
                check.check(number, 0, shard.bin_bytes)
        report("checked", *rate(reader, range(8, 8 + options.samples)), options.seq)
        seconds = options.seq / GPU_TOKENS_PER_SECOND
        waited = waits(reader, options.steps, seconds, torch.device("cpu"))
        reader.close()
    print(f"step     waits {1e3 * np.median(waited):.3f} ms of {1e3 * seconds:.0f} ms (median; longest but the first {1e3 * max(waited[1:]):.3f})")


def write_blend_of(root: Path, tokens: int, median: int) -> Path:
    """One source of random tokens in a few shards, as `prism prep` leaves it."""
    from megatron_prism.data_prep import shards
    from megatron_prism.data_prep.blend import Blend, BlendSource, write_blend
    from megatron_prism.data_prep.manifest import BLOCK_BYTES, BlockHasher, Manifest, Shard, file_sha256, write_manifest

    folder, generator = root / "random" / "train", np.random.default_rng(0)
    folder.mkdir(parents=True)
    dtype, parts = shards.token_dtype(VOCAB), []
    for number in range(SHARDS):
        lengths = np.clip(generator.lognormal(np.log(median), 1.2, tokens // median // SHARDS // 2), 8, 1 << 17).astype(np.int32)
        content = generator.integers(1, VOCAB, int(lengths.sum()), dtype=np.int32).astype(dtype).tobytes()
        prefix = folder / f"shard_{number:05d}"
        prefix.with_suffix(".bin").write_bytes(content)
        prefix.with_suffix(".idx").write_bytes(shards.index_bytes(lengths, dtype))
        hasher = BlockHasher(BLOCK_BYTES)
        hasher.update(content)
        sizes = len(content), prefix.with_suffix(".idx").stat().st_size
        parts.append(Shard(prefix.name, len(lengths), int(lengths.sum()), *sizes, file_sha256(prefix.with_suffix(".idx")), hasher.blocks()))
    print(f"{sum(part.tokens for part in parts):,} tokens in {sum(part.documents for part in parts):,} documents")
    write_manifest(Manifest(folder, "random", "train", "0" * 64, VOCAB, 0, dtype, 0, tuple(parts)))
    return write_blend(root / "blend.toml", Blend(1, (BlendSource("random", "random", 1.0, folder),)))


def rate(reader: "object", samples: range) -> tuple[float, float, int]:
    """Seconds by the clock and of this thread's core for micro-batches of one sample, and how many there were."""
    clock, core = time.perf_counter(), time.thread_time()
    for sample in samples:
        reader.micro_batch(range(sample, sample + 1))  # type: ignore[attr-defined]
    return time.perf_counter() - clock, time.thread_time() - core, len(samples)


def report(name: str, clock: float, core: float, count: int, seq: int) -> None:
    """One line."""
    tokens, each = count * seq / clock, f"{1e3 * clock / count:.3f} ms each ({1e3 * core / count:.3f} of the core)"
    print(
        f"{name:<8} {count / clock:,.1f} micro-batches/s, {each}, {tokens:,.0f} tokens/s, as much as {tokens / GPU_TOKENS_PER_SECOND:,.1f} H200s eat"
    )


def waits(reader: "object", steps: int, seconds: float, device: "object") -> list[float]:
    """What each step of one micro-batch waits for its sample."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_prism.engine.parallel import Mesh
    from megatron_prism.planning.layout import ParallelPlan

    plan = ParallelPlan(tp=1, pp=1, vpp=None, cp=1, dp=1, sp=False, micro_batch=1, num_microbatches=1, padded_vocab_size=VOCAB)
    mesh = Mesh(plan, groups=ProcessGroupCollection(), rank=0, tp_rank=0, pp_rank=0, dp_rank=0, cp_rank=0)
    found = []
    for step in range(steps):
        before = reader.waited_seconds  # type: ignore[attr-defined]
        list(reader.step(step, mesh, device))  # type: ignore[attr-defined]
        found.append(reader.waited_seconds - before)  # type: ignore[attr-defined]
        time.sleep(seconds)
    return found


if __name__ == "__main__":
    main()
