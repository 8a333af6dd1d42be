"""The shard format: Megatron's indexed dataset, `NAME.bin` (token ids, nothing else) beside `NAME.idx` (where each document lies).

The layout is that of megatron.core.datasets.indexed_dataset 0.16.1 (little endian):
    .idx   9 bytes magic, uint64 version 1, uint8 dtype code, uint64 sequences, uint64 sequences + 1,
           int32[n] tokens per sequence, int64[n] byte offset of each, int64[n + 1] first sequence of each document
One sequence is one document here. Token ids are uint16 for vocabularies below 65500, else int32.

Owns: reading and writing the index. Refuses: other versions, several sequences per document, documents of 2^31 tokens.
"""

import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron_prism.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES = {"int32": 4, "uint16": 8}


class Index(NamedTuple):
    """What an .idx file says: the token dtype ("uint16" or "int32") and the tokens of each document, int32 [documents]."""

    dtype: str
    lengths: NDArray[np.int32]


def token_dtype(vocab_size: int) -> str:
    """The dtype that megatron-core chooses for a vocabulary."""
    return "uint16" if vocab_size < 65500 else "int32"


def index_bytes(lengths: NDArray[Any], dtype: DTypeLike) -> bytes:
    """The whole .idx file of documents with these lengths (tokens each, end-of-document included)."""
    dtype = np.dtype(dtype)
    assert lengths.size == 0 or int(lengths.max()) < 1 << 31, lengths.max()
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])[: len(lengths)]
    head = HEADER.pack(MAGIC, 1, DTYPE_CODES[dtype.name], len(lengths), len(lengths) + 1)
    documents = np.arange(len(lengths) + 1, dtype="<i8")
    return b"".join([head, lengths.astype("<i4").tobytes(), starts.astype("<i8").tobytes(), documents.tobytes()])


def read_index(path: Path) -> Index:
    """Read an .idx file. Errors: UserError for a file that is not one, is cut short, or packs several sequences into a document."""
    data = Path(path).read_bytes()
    if len(data) < HEADER.size:
        raise UserError(f"{path} has {len(data)} bytes, an index has at least {HEADER.size}: it was cut short; prepare the data again")
    magic, version, code, sequences, documents = HEADER.unpack_from(data)
    names = {code: name for name, code in DTYPE_CODES.items()}
    if magic != MAGIC or version != 1 or code not in names:
        raise UserError(f"{path} is no index of token ids (version {version}, dtype code {code}); give shards that `prism prep` wrote")
    if documents != sequences + 1 or len(data) != HEADER.size + 12 * sequences + 8 * documents:
        raise UserError(f"{path} has {len(data)} bytes for {sequences} documents: it was cut short or packs documents; prepare the data again")
    return Index(names[code], np.frombuffer(data, dtype="<i4", count=sequences, offset=HEADER.size))
