"""What a tokenising process does: a chunk of raw input in, the ids of its documents out. Imports little, for it is started once for each core.

Owns: the state of a worker. Refuses nothing: what is bad in a chunk is counted and sent back.
"""

import multiprocessing
import os
import signal
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prism.data_prep import documents
from megatron_prism.data_prep.documents import Documents, Extract
from megatron_prism.data_prep.shards import token_dtype
from megatron_prism.data_prep.tokenizer import Encode, Tokenizer, limit_threads, load_encoder


@dataclass
class Tokenized:
    """A chunk's documents as ids, end to end, each with its end-of-document id; `found` keeps the counts (its texts are gone)."""

    tokens: NDArray[Any]
    lengths: NDArray[np.int32]
    text_bytes: NDArray[np.int64]
    found: Documents


_encode: Encode
_tokenizer: Tokenizer


def start(tokenizer: Tokenizer) -> None:
    """Make this process a worker: called once in each, before any chunk."""
    global _encode, _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which stops the pool
    threading.Thread(target=end_with_parent, daemon=True).start()
    limit_threads()
    _encode, _tokenizer = load_encoder(tokenizer), tokenizer


def end_with_parent() -> None:
    """Without this a worker would wait for work for ever after its parent is killed: the workers hold each other's pipe open."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def tokenise(kind: str, payload: Any, extract: Extract) -> Tokenized:
    """The ids of a chunk's documents, each ended by the end-of-document id; kind and payload as for `documents.read_chunk`."""
    found = documents.read_chunk(kind, payload, extract)
    ids: list[int] = []
    lengths, sizes = [], []
    for tokens, size in zip(_encode(found.texts), found.text_bytes, strict=True):
        if not tokens:  # nothing but what the tokenizer's normalisation removes
            found.empty += 1
            continue
        ids += tokens
        ids.append(_tokenizer.end_of_document)
        lengths.append(len(tokens) + 1)
        sizes.append(size)
    found.texts, found.text_bytes, found.places = [], [], []
    dtype = token_dtype(_tokenizer.vocab_size)
    return Tokenized(np.array(ids, dtype=dtype), np.array(lengths, dtype=np.int32), np.array(sizes, dtype=np.int64), found)
