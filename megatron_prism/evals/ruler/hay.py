"""Hay: what a puzzle is hidden in.

RULER's prose is Paul Graham's essays and its words are wonderwords'; neither is on every machine. Here prose is DATA_DIR/essays.txt where there is
one, or the documents of DATA_DIR/essays, an output of `prism prep`; else the Python language reference (pydoc's topics, of this Python: the digest is
part of each question). Words are reasoning-gym's, of 3 to 5 letters.
Owns: what hay there is. Refuses: prose without words.
"""

import hashlib
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from megatron_prism.errors import UserError

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
ESSAYS = "essays"
PREPARED_TOKENS = 1 << 18
"""read of a prep output: twice the longest task"""
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class Prose(NamedTuple):
    """Words of a text, in order; and the text's name with its digest."""

    words: tuple[str, ...]
    name: str

    def sentences(self, num_words: int) -> list[str]:
        """The first so many words, from the beginning again where the text ends, cut into sentences."""
        rounds = -(-num_words // len(self.words))
        return SENTENCE_END.split(" ".join((self.words * rounds)[:num_words]))


@cache
def prose(data_dir: Path | None) -> Prose:
    """DATA_DIR/essays.txt, DATA_DIR/essays, or the Python language reference; read once. Errors: UserError for prose without words."""
    file, prepared = (data_dir / f"{ESSAYS}.txt", data_dir / ESSAYS) if data_dir is not None else (None, None)
    if file is not None and file.is_file():
        return _own(file, file.read_text(encoding="utf-8"))
    if prepared is not None and prepared.is_dir():
        return _own(prepared, _documents(prepared))
    from pydoc_data.topics import topics

    return _prose("\n".join(topics[name] for name in sorted(topics)), "Python language reference")


def _own(path: Path, text: str) -> Prose:
    if not text.split():
        raise UserError(f"{path} holds no words: put prose there, or remove it, and the Python language reference is taken")
    return _prose(text, path.name)


def _documents(folder: Path) -> str:
    """The first documents of a prep output, up to PREPARED_TOKENS tokens of each source."""
    from transformers import AutoTokenizer

    from megatron_prism.data_prep.blend import load_blend
    from megatron_prism.evals.tokens import TokenStream

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True, trust_remote_code=False)
    parts = []
    for manifest in load_blend(folder).manifests():
        stream = TokenStream(manifest)
        tokens = stream.read(0, min(len(stream), PREPARED_TOKENS))
        parts.append(tokenizer.decode(tokens[tokens != manifest.end_of_document].tolist()))
    return "\n".join(parts)


def _prose(text: str, name: str) -> Prose:
    return Prose(tuple(text.split()), f"{name}, sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}")


@cache
def words() -> tuple[str, ...]:
    """English words of 3 to 5 letters, in lower case, sorted."""
    from reasoning_gym.data import read_data_file

    return tuple(sorted({word.lower() for line in read_data_file("words.csv").splitlines()[1:] for word in line.split(",") if word.isalpha()}))
