"""Filters on a document's text alone: lengths, symbols, repeated lines.

The kind of rules that Gopher's corpus was made with (Rae et al. 2021, arXiv:2112.11446, appendix A.1.1). Owns: what each rule measures, and
the name it is counted under. Refuses nothing.
"""

import string
from typing import NamedTuple

ASCII_LETTERS = (string.ascii_letters + string.digits).encode()
ASCII_SPACE = string.whitespace.encode() + b"\x1c\x1d\x1e\x1f"


class Filters(NamedTuple):
    """The limits of one source; None: off. Characters are code points, words are what white space separates."""

    min_characters: int | None = None
    max_characters: int | None = None
    min_words: int | None = None
    max_words: int | None = None
    max_symbol_share: float | None = None
    max_repeated_line_share: float | None = None

    def dropped_by(self, text: str) -> str | None:
        """The first rule that the document fails, as reports name it."""
        return self._by_length(text) or self._by_content(text)

    def _by_length(self, text: str) -> str | None:
        if self.min_characters is not None and len(text) < self.min_characters:
            return f"shorter than {self.min_characters} characters"
        if self.max_characters is not None and len(text) > self.max_characters:
            return f"longer than {self.max_characters} characters"
        if self.min_words is None and self.max_words is None:
            return None
        words = len(text.split())
        if self.min_words is not None and words < self.min_words:
            return f"fewer than {self.min_words} words"
        if self.max_words is not None and words > self.max_words:
            return f"more than {self.max_words} words"
        return None

    def _by_content(self, text: str) -> str | None:
        if self.max_symbol_share is not None and symbol_share(text) > self.max_symbol_share:
            return f"symbols are more than {self.max_symbol_share:g} of it"
        if self.max_repeated_line_share is not None and repeated_line_share(text) > self.max_repeated_line_share:
            return f"repeated lines are more than {self.max_repeated_line_share:g} of it"
        return None


def symbol_share(text: str) -> float:
    """Of the characters that are not white space, the share that are neither letters nor digits (Unicode's; a combining mark counts as a symbol)."""
    if text.isascii():
        inked = text.encode().translate(None, ASCII_SPACE)
        return len(inked.translate(None, ASCII_LETTERS)) / len(inked) if inked else 0.0
    inked_text = "".join(text.split())
    return 1 - sum(map(str.isalnum, inked_text)) / len(inked_text) if inked_text else 0.0


def repeated_line_share(text: str) -> float:
    """Of the lines that are not blank, the share that equal an earlier one, white space at the ends aside."""
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0
