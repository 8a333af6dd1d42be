"""Hay: what a puzzle is hidden in.

RULER's prose is Paul Graham's essays and its words are wonderwords'; neither is on every machine. Here prose is DATA_DIR/essays.txt where there is
one, else the Python language reference (pydoc's topics, of this Python: the digest is part of each question), and words are reasoning-gym's, of 3 to
5 letters.
Owns: what hay there is. Refuses: an empty essays.txt.
"""

import hashlib
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from megatron_prism.errors import UserError

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
ESSAYS = "essays.txt"
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class Prose(NamedTuple):
    """Words of a text, in order; and the text's name with its digest."""

    words: tuple[str, ...]
    name: str

    def sentences(self, num_words: int) -> list[str]:
        """The first so many words, from the beginning again where the text ends, cut into sentences."""
        rounds = -(-num_words // len(self.words))
        return SENTENCE_END.split(" ".join((self.words * rounds)[:num_words]))


def prose(data_dir: Path | None) -> Prose:
    """DATA_DIR/essays.txt, or the Python language reference. Errors: UserError for a file without words."""
    own = data_dir / ESSAYS if data_dir is not None else None
    return _reference() if own is None or not own.is_file() else _read(own)


def _read(path: Path) -> Prose:
    text = path.read_text(encoding="utf-8")
    if not text.split():
        raise UserError(f"{path} holds no words: put prose there, or remove it, and the Python language reference is taken")
    return _prose(text, path.name)


@cache
def _reference() -> Prose:
    from pydoc_data.topics import topics

    return _prose("\n".join(topics[name] for name in sorted(topics)), "Python language reference")


def _prose(text: str, name: str) -> Prose:
    return Prose(tuple(text.split()), f"{name}, sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}")


@cache
def words() -> tuple[str, ...]:
    """English words of 3 to 5 letters, in lower case, sorted."""
    from reasoning_gym.data import read_data_file

    return tuple(sorted({word.lower() for line in read_data_file("words.csv").splitlines()[1:] for word in line.split(",") if word.isalpha()}))
