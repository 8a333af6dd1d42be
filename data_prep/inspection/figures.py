"""The figures of a blend, as plain tables: shares, epochs, lengths, packing, and what became of the records. Seconds, whatever the size.

Totals are the manifests' and exact. Lengths are read from the indices in blocks spread evenly over a source, and packing is computed on them: both
are of a sample where a source has more documents than its part of SAMPLED_DOCUMENTS, and each says of how many. No token is read here.
Owns: the figures. Refuses: what loading a blend refuses, and indices that are not their manifest's.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prism.data_prep.blend import Blend, BlendSource
from megatron_prism.data_prep.manifest import Manifest, check_size, load_manifest
from megatron_prism.data_prep.packing import PackingOptions, pack
from megatron_prism.data_prep.shards import bin_path, idx_path, open_tables

SAMPLED_DOCUMENTS = 1_000_000
"""Over all sources together."""
BLOCK_DOCUMENTS = 4096
REPORT = "report.json"
CLEANING = "cleaning.json"


def figures(blend: Blend, seq_len: int, training_tokens: int | None = None, sampled_documents: int = SAMPLED_DOCUMENTS) -> dict[str, Any]:
    """Everything the page shows but the decoded documents; JSON types. training_tokens: how long the run is that epochs are counted for."""
    total_weight = sum(source.weight for source in blend.sources)
    limit = max(1, sampled_documents // len(blend.sources))
    sources = [_source(source, source.weight / total_weight, seq_len, training_tokens, limit) for source in blend.sources]
    return {
        "seed": blend.seed,
        "seq_len": seq_len,
        "training_tokens": training_tokens,
        "totals": {key: sum(source["train"][key] for source in sources) for key in ("documents", "tokens")},
        "tokens_before_any_source_repeats": min((source["train"]["tokens"] / source["share"] for source in sources), default=0),
        "domains": _domains(sources),
        "sources": sources,
    }


def _source(source: BlendSource, share: float, seq_len: int, training_tokens: int | None, limit: int) -> dict[str, Any]:
    train = load_manifest(source.train)
    lengths, of = sample_lengths(train, limit)
    sampled = None if training_tokens is None else training_tokens * share
    return {
        "name": source.name,
        "domain": source.domain,
        "weight": source.weight,
        "share": share,
        "train": _totals(train),
        "validation": None if source.validation is None else _totals(load_manifest(source.validation)),
        "sampled_tokens": sampled,
        "epochs": None if sampled is None or not train.num_tokens else sampled / train.num_tokens,
        "lengths": _histogram(lengths) | {"of_documents": of},
        "packing": _packing(lengths, seq_len),
        "counts": _counts(source.train.parent),
    }


def _totals(manifest: Manifest) -> dict[str, Any]:
    return {
        "documents": manifest.num_documents,
        "tokens": manifest.num_tokens,
        "shards": len(manifest.shards),
        "text_bytes": manifest.text_bytes,
        "vocab_size": manifest.vocab_size,
        "adopted": manifest.adopted,
    }


def _domains(sources: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    domains: dict[str, dict[str, Any]] = {}
    for source in sources:
        found = domains.setdefault(source["domain"], {"documents": 0, "tokens": 0, "share": 0.0})
        found["documents"] += source["train"]["documents"]
        found["tokens"] += source["train"]["tokens"]
        found["share"] += source["share"]
    return domains


def sample_lengths(manifest: Manifest, limit: int) -> tuple[NDArray[np.int32], int]:
    """Tokens of the split's documents that have any, and of how many documents of its shards: all, or blocks that hold about `limit`."""
    counts = [shard.documents for shard in manifest.shards]
    first_of = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    total = int(first_of[-1])
    blocks = -(-total // BLOCK_DOCUMENTS)
    wanted = max(1, limit // BLOCK_DOCUMENTS)
    chosen = np.arange(blocks) if total <= limit else np.unique(np.linspace(0, blocks - 1, wanted).round().astype(np.int64))
    parts, read = [np.zeros(0, np.int32)], 0
    for block in chosen.tolist():
        start, stop = block * BLOCK_DOCUMENTS, min((block + 1) * BLOCK_DOCUMENTS, total)
        shard = int(np.searchsorted(first_of, start, side="right")) - 1
        while start < stop:
            end = min(stop, int(first_of[shard + 1]))
            found = _lengths(manifest, shard, start - int(first_of[shard]), end - int(first_of[shard]))
            parts.append(found[manifest.chosen(start, end - start) & (found > 0)])
            read, start, shard = read + end - start, end, shard + 1
    return np.concatenate(parts), read


def _lengths(manifest: Manifest, shard: int, start: int, stop: int) -> NDArray[np.int32]:
    prefix = manifest.prefixes[shard]
    check_size(idx_path(prefix), manifest.shards[shard].idx_bytes)
    check_size(bin_path(prefix), manifest.shards[shard].bin_bytes)
    return np.array(open_tables(idx_path(prefix)).lengths[start:stop])


def _histogram(lengths: NDArray[np.int32]) -> dict[str, Any]:
    """Documents and their tokens by length; bin b holds lengths from edges[b] to edges[b + 1] - 1, powers of two."""
    bits = np.frexp(lengths.astype(np.float64))[1]  # of 1 it is 1, of 2 and 3 it is 2
    documents = np.bincount(bits)[1:]
    tokens = np.bincount(bits, weights=lengths.astype(np.float64))[1:].astype(np.int64)
    summary: dict[str, Any] = {"median": None, "p99": None, "mean": None, "longest": None}
    if len(lengths):
        median, p99 = np.percentile(lengths, [50, 99], method="lower").tolist()
        summary = {"median": median, "p99": p99, "mean": float(lengths.mean()), "longest": int(lengths.max())}
    return {
        "sampled": len(lengths),
        "edges": [1 << bit for bit in range(len(documents) + 1)],
        "documents": documents.tolist(),
        "tokens": tokens.tolist(),
        **summary,
    }


def _packing(lengths: NDArray[np.int32], seq_len: int) -> dict[str, Any]:
    packed = pack(lengths, PackingOptions(seq_len, over_length="split"))
    return {
        "documents": len(lengths),
        "longer_than_seq_len": int((lengths > seq_len).sum()),
        "buffers": packed.num_buffers,
        "fill": packed.fill if len(lengths) else None,
    }


def _counts(folder: Path) -> dict[str, int]:
    """Every whole number that a source's reports hold, by its path in them: whatever rules there are today."""
    found = _leaves(_read(folder / REPORT), "")
    cleaned = _read(folder.parent / CLEANING).get("sources", {})
    return dict(found + _leaves(cleaned.get(folder.name, {}), "cleaning"))


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}


def _leaves(content: Any, place: str) -> list[tuple[str, int]]:
    if isinstance(content, dict):
        return [leaf for key, value in content.items() for leaf in _leaves(value, f"{place}: {key}" if place else str(key))]
    return [(place, content)] if isinstance(content, int) and not isinstance(content, bool) else []
