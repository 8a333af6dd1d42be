"""Words and word n-grams as 64-bit numbers: what near duplicates and contamination are told by.

A word is a run of letters, digits, underscores and combining marks (accents, vowel signs), in NFKC and casefolded; everything else separates words
and is dropped, as in GPT-3's decontamination (Brown et al. 2020, arXiv:2005.14165, appendix C). Chinese characters and Japanese kana are a word each,
with the marks that follow them.

Owns: that normalisation (NORMALISATION names it in files), and the hashes of words and n-grams. Refuses nothing.
"""

import functools
import itertools
import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

NORMALISATION = "words-2"
MULTIPLIER = np.uint64(0xD6E8FEB86659FD93)
BLOCK_CHARACTERS = 1 << 20
_SINGLE = "\u3040-\u3098\u309b-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d"
_ASCII_WORD = re.compile(r"\w+", re.ASCII)
_SPACE = re.compile(r"\s")
_ASCII_WORDS = bytes(ord(chr(byte).lower()) if re.fullmatch(_ASCII_WORD, chr(byte)) else ord(" ") for byte in range(256))
"""bytes.translate table: capitals to small letters, all that is no part of a word to a space (many times as quick as the expression)"""
Hashes = NDArray[np.uint64]


class Flat(NamedTuple):
    """Rows of word hashes end to end: row r is words[offsets[r] : offsets[r + 1]]."""

    words: Hashes
    offsets: NDArray[np.int64]


@functools.cache
def _word() -> re.Pattern[str]:
    """The expression of a word; made when the first text needs it, for it looks at every code point."""
    marks = [point for point in range(0x300, 0x110000) if unicodedata.category(chr(point)) in ("Mn", "Mc", "Me")]
    starts = [point for point, before in zip(marks, [0, *marks], strict=False) if point != before + 1]
    stops = [point for point, after in zip(marks, [*marks[1:], 0], strict=True) if after != point + 1]
    mark = "".join(f"{re.escape(chr(start))}-{re.escape(chr(stop))}" for start, stop in zip(starts, stops, strict=True))
    return re.compile(rf"[{_SINGLE}][{mark}\uff9e\uff9f]*|(?:[^\W{_SINGLE}]|[{mark}])+")


def words(text: str) -> list[str]:
    """The words of a text."""
    if text.isascii():
        return text.encode().translate(_ASCII_WORDS).decode().split()
    return [_normal(word) for word in _word().findall(text)]


def _normal(word: str) -> str:
    return word.lower() if word.isascii() else "".join(unicodedata.normalize("NFKC", word).casefold().split())


def spans(text: str) -> list[tuple[int, int]]:
    """Where each word stands in the text: characters [start, stop)."""
    pattern = _ASCII_WORD if text.isascii() else _word()
    return [found.span() for found in pattern.finditer(text)]


def without(text: str, ranges: list[tuple[int, int]]) -> str:
    """The text with these characters taken out."""
    edges = [0, *itertools.chain.from_iterable(ranges), len(text)]
    return "".join(text[start:stop] for start, stop in zip(edges[::2], edges[1::2], strict=True))


def word_hashes(text: str) -> Hashes:
    """xxh3-64 of every word; a huge text is read in blocks, so that memory is 8 bytes a word."""
    parts = [_hashes(block.encode().translate(_ASCII_WORDS).split()) if block.isascii() else hash_words(words(block)) for block in _blocks(text)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def hash_words(found: list[str]) -> Hashes:
    """xxh3-64 of each of the words."""
    return _hashes("\n".join(found).encode().split(b"\n") if found else [])


def _hashes(found: list[bytes]) -> Hashes:
    return np.fromiter(map(xxhash.xxh3_64_intdigest, found), np.uint64, len(found))


def check_hash(found: list[str]) -> int:
    """xxh3-64 of the words joined by one space: the second number by which an n-gram is known."""
    return xxhash.xxh3_64_intdigest(" ".join(found).encode())


def _blocks(text: str) -> Iterator[str]:
    """The text in pieces that end at white space."""
    start = 0
    while len(text) - start > BLOCK_CHARACTERS and (gap := _SPACE.search(text, start + BLOCK_CHARACTERS)):
        yield text[start : gap.start()]
        start = gap.start()
    yield text[start:] if start else text


def flatten(rows: list[Hashes]) -> Flat:
    """Rows of word hashes end to end."""
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return Flat(np.concatenate([np.zeros(0, np.uint64), *rows]), offsets)


def ngrams(flat: Flat, n: int) -> tuple[Hashes, NDArray[np.int64]]:
    """The hash of every n-gram that lies in one row, and the place of its first word in `flat.words`; both in order."""
    left = np.repeat(flat.offsets[1:], np.diff(flat.offsets)) - np.arange(len(flat.words))
    starts = np.flatnonzero(left >= n)
    if not len(starts):
        return np.zeros(0, np.uint64), starts
    return _polynomial(flat.words, n)[starts], starts


def sequence_hash(row: Hashes) -> int:
    """The hash of a whole row as one n-gram; the one that `ngrams` gives it."""
    return int(_polynomial(row, len(row))[0])


def _polynomial(values: Hashes, n: int) -> Hashes:
    """sum of values[i + k] * M^(n - 1 - k) mod 2^64 for every i, mixed. Values are hashes, so two sums meet by chance alone."""
    count = len(values) - n + 1
    total = np.zeros(count, np.uint64)
    for k in range(n):
        total = total * MULTIPLIER + values[k : k + count]
    return mixed(total)


def mixed(values: Hashes) -> Hashes:
    """splitmix64's finaliser (Steele, Lea, Flood 2014): a bijection after which every bit depends on all."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
