"""Which documents repeat an earlier one, from signatures on disk, in bounded memory.

Exact: equal 128-bit hashes; the first in input order stays. Near: two documents that share a band key are compared by their 8-bit signatures; those
whose estimated Jaccard similarity reaches the threshold are joined, and the first of each connected component stays. In a group that shares a key,
each is compared with the group's first and with the one before it: linear in the group.

Memory: hashes are read in as many passes over the files as they need, each pass a range of hash values, so that the result does not depend on the
number of passes. Owns: that arithmetic, and the joining. Refuses: more documents than a pass of nothing but the fixed cost leaves room for.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prism.data_prep.cleaning.columns import Columns, band_column
from megatron_prism.errors import UserError

FIXED_BYTES = 18
"""A document: 8 for the one that it repeats, 1 for its verdict, and as much again while components are told."""
PASS_BYTES = 72
"""A document of a pass: its place and its hash, read in pieces and joined, sorted with its order, compared with its neighbour."""
PAIRS_AT_ONCE = 1 << 15
"""Signatures compared together: 10 MB beside the memory that the recipe gives."""
KEPT, EXACT, NEAR, FIRST_TASK = 0, 1, 2, 3
"""Verdicts: FIRST_TASK + t is contamination by task t."""

Indices = NDArray[np.int64]


def number_of_passes(documents: int, memory_bytes: float) -> int:
    """Passes over the hashes that keep within the memory. Errors: UserError with what would be needed."""
    room = memory_bytes - FIXED_BYTES * documents
    if documents and room < PASS_BYTES * documents / 1000:
        least = (FIXED_BYTES + PASS_BYTES / 1000) * documents / 2**30
        raise UserError(
            f"cleaning.memory_gib={memory_bytes / 2**30:g} is too little to tell the duplicates of {documents:,} documents: "
            f"{least:.2f} GiB is the least; raise it, or split the sources over several outputs"
        )
    return max(1, int(np.ceil(PASS_BYTES * documents / max(room, 1)))) if documents else 1


class Corpus:
    """The columns of all sources, end to end: document i of the corpus is of the source whose range holds i."""

    def __init__(self, sources: Sequence[Columns]):
        self.sources = sources
        self.offsets = np.concatenate([[0], np.cumsum([source.documents for source in sources])]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def blocks(self, name: str) -> Iterator[tuple[int, NDArray[Any]]]:
        """(first document, rows) over all sources."""
        for offset, source in zip(self.offsets, self.sources, strict=False):
            for first, rows in source.blocks(name):
                yield int(offset) + first, rows

    def take(self, name: str, documents: Indices) -> NDArray[Any]:
        """Rows of a column in any order."""
        place = np.searchsorted(self.offsets, documents, "right") - 1
        parts = [self.sources[number].read(name) for number in range(len(self.sources))]
        found = np.zeros((len(documents), *parts[0].shape[1:]), parts[0].dtype)
        for number in np.unique(place):
            chosen = np.flatnonzero(place == number)
            rows = documents[chosen] - self.offsets[number]
            order = np.argsort(rows)
            found[chosen[order]] = parts[number][rows[order]]
        return found


def find_duplicates(
    corpus: Corpus, exact: bool, bands: int, threshold: float, memory_bytes: float, advance: Callable[[], None] = lambda: None
) -> tuple[NDArray[np.uint8], Indices]:
    """(verdict, the document that it repeats, or itself) of every document. bands: 0 without near duplicates. advance: called after each pass."""
    passes = number_of_passes(len(corpus), memory_bytes) if exact or bands else 1
    verdicts = np.zeros(len(corpus), np.uint8)
    for first, codes in corpus.blocks("code"):
        verdicts[first : first + len(codes)] = np.where(codes == 0, KEPT, codes.astype(np.int64) - 1 + FIRST_TASK)
    same_as = np.arange(len(corpus), dtype=np.int64)
    if exact:
        for number in range(passes):
            _exact_pass(corpus, verdicts, same_as, number, passes)
            advance()
    for band in range(bands):
        for number in range(passes):
            _near_pass(corpus, band, verdicts, same_as, threshold, number, passes)
            advance()
    if bands:
        _settle_components(verdicts, same_as)
    return verdicts, same_as


def _select(corpus: Corpus, name: str, verdicts: NDArray[np.uint8], number: int, passes: int) -> tuple[Indices, NDArray[np.uint64]]:
    """The documents that are still kept and whose hash lies in the pass's range, with their hashes. Rows of two: the first decides the range."""
    places, values = [np.zeros(0, np.int64)], []
    for first, rows in corpus.blocks(name):
        lead = rows if rows.ndim == 1 else rows[:, 0]
        chosen = verdicts[first : first + len(rows)] == KEPT
        if passes > 1:
            chosen &= ((lead >> np.uint64(32)) * np.uint64(passes)) >> np.uint64(32) == number
        at = np.flatnonzero(chosen)
        places.append(first + at)
        values.append(np.asarray(rows[at]))
    return np.concatenate(places), np.concatenate(values) if values else np.zeros(0, np.uint64)


def _exact_pass(corpus: Corpus, verdicts: NDArray[np.uint8], same_as: Indices, number: int, passes: int) -> None:
    places, hashes = _select(corpus, "exact", verdicts, number, passes)
    if not len(places):
        return
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: equal hashes stay in input order
    hashes = hashes[order]
    begins = np.concatenate([[True], (hashes[1:] != hashes[:-1]).any(axis=1)])
    first = places[order][_group_starts(begins)]
    repeated = places[order][~begins]
    verdicts[repeated] = EXACT
    same_as[repeated] = first[~begins]


def _group_starts(begins: NDArray[np.bool_]) -> Indices:
    """For each place of a sorted list, the place where its group of equals begins."""
    return np.maximum.accumulate(np.where(begins, np.arange(len(begins)), 0))


def _near_pass(corpus: Corpus, band: int, verdicts: NDArray[np.uint8], same_as: Indices, threshold: float, number: int, passes: int) -> None:
    places, keys = _select(corpus, band_column(band), verdicts, number, passes)
    order = np.argsort(keys, kind="stable")
    keys, places = keys[order], places[order]
    begins = np.concatenate([[True], keys[1:] != keys[:-1]]) if len(keys) else np.zeros(0, bool)
    starts = _group_starts(begins)
    later = np.flatnonzero(~begins)
    for begin in range(0, len(later), PAIRS_AT_ONCE):
        some = later[begin : begin + PAIRS_AT_ONCE]
        for other in (starts[some], some - 1):
            _join_if_near(corpus, same_as, places[other], places[some], threshold)


def _join_if_near(corpus: Corpus, same_as: Indices, left: Indices, right: Indices, threshold: float) -> None:
    apart = _roots(same_as, left) != _roots(same_as, right)
    left, right = left[apart], right[apart]
    if not len(left):
        return
    near = jaccard(corpus.take("low", left), corpus.take("low", right)) >= threshold
    join(same_as, left[near], right[near])


def jaccard(left: NDArray[np.uint8], right: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The similarity that two signatures [n, permutations] of 8 bits each estimate: 1 in 256 agrees by chance."""
    return ((left == right).mean(axis=1) - 1 / 256) / (1 - 1 / 256)


def join(same_as: Indices, left: Indices, right: Indices) -> None:
    """Put each pair into one component, in place. `same_as` points from every document to an earlier one of its component, or to itself."""
    while len(left):
        left, right = _roots(same_as, left), _roots(same_as, right)
        apart = left != right
        left, right = left[apart], right[apart]
        np.minimum.at(same_as, np.maximum(left, right), np.minimum(left, right))


def _roots(same_as: Indices, documents: Indices) -> Indices:
    """The first document of each one's component; the paths walked are shortened."""
    found = same_as[documents]
    while (further := same_as[found] != found).any():
        found[further] = same_as[found[further]]
    same_as[documents] = found
    return found


def _settle_components(verdicts: NDArray[np.uint8], same_as: Indices) -> None:
    """Every document that is not the first of its component is a near duplicate of the first; an exact one's pointer stays."""
    kept = np.flatnonzero(verdicts == KEPT)
    for begin in range(0, len(kept), 1 << 20):
        some = kept[begin : begin + (1 << 20)]
        first = _roots(same_as, some)
        verdicts[some[first != some]] = NEAR
