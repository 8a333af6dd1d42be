"""Small shards and blends for tests, written with megatron-core's own builder and with manifests as `prism prep` leaves them."""

from pathlib import Path

import numpy as np

from megatron_prism.data_prep import shards
from megatron_prism.data_prep.blend import Blend, BlendSource, write_blend
from megatron_prism.data_prep.manifest import BLOCK_BYTES, BlockHasher, Manifest, Shard, file_sha256, write_manifest

END_OF_DOCUMENT = 0


def write_source(root: Path, name: str, split: str, documents: list[list[int]], vocab_size: int, num_shards: int = 2) -> Manifest:
    """One split of one source from lists of token ids (an end of document is added to each)."""
    folder = root / name / split
    folder.mkdir(parents=True)
    dtype = shards.token_dtype(vocab_size)
    parts = []
    for number, chosen in enumerate(np.array_split(np.arange(len(documents)), num_shards)):
        rows = [np.array([*documents[index], END_OF_DOCUMENT], dtype=dtype) for index in chosen]
        prefix = folder / f"shard_{number:05d}"
        tokens = np.concatenate(rows)
        prefix.with_suffix(".bin").write_bytes(tokens.tobytes())
        prefix.with_suffix(".idx").write_bytes(shards.index_bytes(np.array([len(row) for row in rows], dtype=np.int32), dtype))
        hasher = BlockHasher(BLOCK_BYTES)
        hasher.update(tokens.tobytes())
        sizes = prefix.with_suffix(".bin").stat().st_size, prefix.with_suffix(".idx").stat().st_size
        parts.append(Shard(prefix.name, len(rows), len(tokens), *sizes, file_sha256(prefix.with_suffix(".idx")), hasher.blocks()))
    manifest = Manifest(folder, name, split, "0" * 64, vocab_size, END_OF_DOCUMENT, dtype, 0, tuple(parts))
    write_manifest(manifest)
    return manifest


def counting_documents(rng: np.random.Generator, count: int, vocab_size: int) -> list[list[int]]:
    """Documents that a model can learn: runs of ids that count upwards by one or two, of 3 to 60 tokens."""
    documents = []
    for _ in range(count):
        start, stride, length = rng.integers(1, vocab_size), rng.integers(1, 3), rng.integers(3, 60)
        documents.append([int(1 + (start + stride * step) % (vocab_size - 1)) for step in range(length)])
    return documents


def write_tiny_blend(root: Path, vocab_size: int = 96, seed: int = 7) -> Path:
    """A blend of two sources, "code" (weight 3) and "math" (weight 1), each with a validation split; returns blend.toml."""
    rng = np.random.default_rng(seed)
    sources = []
    for name, weight, count in (("code", 3.0, 60), ("math", 1.0, 25)):
        for split, documents in (("train", count), ("validation", count // 3)):
            write_source(root, name, split, counting_documents(rng, documents, vocab_size), vocab_size)
        sources.append(BlendSource(name, name, weight, root / name / "train", root / name / "validation"))
    return write_blend(root / "blend.toml", Blend(seed, tuple(sources)))
