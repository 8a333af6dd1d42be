"""Shards of a few real sentences, written with the project's own format, for tests that read them."""

from pathlib import Path

DOCUMENTS = [
    "the cat sat on the mat. one two three.",
    "def f(x):\n    return x + 1\n",
    "ünïcode ☃ text, with a tail",
    "",
    "seven eight nine ten. Answer: 42.",
]


def write_split(folder: Path, tokenizer_folder: Path, documents: list[str], shards: int = 1) -> Path:
    """A split folder (manifest and shards) of these documents, each ended by the tokenizer's end-of-sequence id."""
    import numpy as np
    from transformers import AutoTokenizer

    from megatron_prism.data_prep import manifest
    from megatron_prism.data_prep import shards as shard_format

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    folder.mkdir(parents=True)
    dtype = shard_format.token_dtype(len(tokenizer))
    written = []
    for number, texts in enumerate(np.array_split(np.array(documents, dtype=object), shards)):
        ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in texts]
        prefix = folder / f"shard_{number:05d}"
        data = np.array([token for row in ids for token in row], dtype=dtype).tobytes()
        index = shard_format.index_bytes(np.array([len(row) for row in ids]), dtype)
        prefix.with_suffix(".bin").write_bytes(data)
        prefix.with_suffix(".idx").write_bytes(index)
        hasher = manifest.BlockHasher()
        hasher.update(data)
        sha256 = manifest.file_sha256(prefix.with_suffix(".idx"))
        tokens = sum(len(row) for row in ids)
        written.append(manifest.Shard(prefix.name, len(ids), tokens, len(data), len(index), sha256, hasher.blocks()))
    text_bytes = sum(len(text.encode()) for text in documents)
    manifest.write_manifest(
        manifest.Manifest(folder, folder.parent.name, folder.name, "test", len(tokenizer), tokenizer.eos_token_id, dtype, text_bytes, tuple(written))
    )
    return folder
