"""What a tokenising process does: a chunk of raw input in, the ids of its documents out. Imports little, for it is started once for each core.

Owns: the state of a worker. Refuses nothing: what is bad in a chunk is counted and sent back.
"""

import gc
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_prism.data_prep import documents, processes
from megatron_prism.data_prep.answers import Bits, tokens_of
from megatron_prism.data_prep.documents import Documents, Extract
from megatron_prism.data_prep.shards import token_dtype
from megatron_prism.data_prep.tokenizer import Encode, Ids, Tokenizer, hide_torch, load_encoder, load_marking_encoder


@dataclass
class Tokenized:
    """A chunk's documents as ids, end to end, each with its end-of-document id; `found` keeps the counts (its texts are gone).

    answers: which of the tokens are; None where the source's format does not tell.
    """

    tokens: NDArray[Any]
    lengths: NDArray[np.int32]
    text_bytes: NDArray[np.int64]
    found: Documents
    answers: Bits | None = None


_encode: Encode
_tokenizer: Tokenizer


def start(tokenizer: Tokenizer) -> None:
    """Make this process a worker: called once in each, before any chunk."""
    global _encode, _tokenizer
    processes.begin()
    hide_torch()  # a chat template needs transformers alone
    _encode, _tokenizer = load_encoder(tokenizer), tokenizer
    gc.freeze()  # what is loaded stays: no collection needs to look at it


def tokenise(kind: str, payload: Any, extract: Extract) -> Tokenized:
    """The ids of a chunk's documents, each ended by the end-of-document id; kind and payload as for `documents.read_chunk`."""
    found = documents.read_chunk(kind, payload, extract)
    end_id = np.array([_tokenizer.end_of_document], np.uint32)
    pieces: list[Ids] = [end_id[:0]]
    lengths, sizes = [], []
    marked = _mark(found) if extract.knows_answers and _tokenizer.backend is not None else None
    answers: list[Bits] = []
    for number, (tokens, size) in enumerate(zip(_encode(found.texts) if marked is None else marked.ids, found.text_bytes, strict=True)):
        if not len(tokens):  # nothing but what the tokenizer's normalisation removes
            found.empty += 1
            continue
        end = end_id[:0] if extract.may_end_itself and tokens[-1] == _tokenizer.end_of_document else end_id
        pieces += [tokens, end]
        if marked is not None:
            answers += [marked.answers[number], np.full(len(end), marked.ends_in_answer[number])]
        lengths.append(len(tokens) + len(end))
        sizes.append(size)
    found.texts, found.text_bytes, found.places, found.answers = [], [], [], []
    columns = _narrowed(np.concatenate(pieces)), np.array(lengths, dtype=np.int32), np.array(sizes, dtype=np.int64)
    return Tokenized(*columns, found, None if marked is None else np.concatenate([np.zeros(0, dtype=bool), *answers]))


def _narrowed(tokens: Ids) -> NDArray[Any]:
    assert not len(tokens) or tokens.max() < _tokenizer.vocab_size, "an id beyond the vocabulary would be another one in fewer bytes"
    return tokens.astype(token_dtype(_tokenizer.vocab_size))


class MarkedIds(NamedTuple):
    """Documents as ids, which of these are answers, and whether the text ends in one, so that its end is to be learnt too."""

    ids: list[Ids]
    answers: list[Bits]
    ends_in_answer: list[bool]


def _mark(found: Documents) -> MarkedIds:
    """The ids of `_encode`, with the answers that `found` knows by their characters."""
    assert _tokenizer.backend is not None
    ids, offsets = load_marking_encoder(_tokenizer.backend)(found.texts)
    ranges = [answers or () for answers in found.answers]
    bits = [tokens_of(answers, places) for answers, places in zip(ranges, offsets, strict=True)]
    ends = [any(begin < end == len(text) for begin, end in answers) for answers, text in zip(ranges, found.texts, strict=True)]
    return MarkedIds(ids, bits, ends)
