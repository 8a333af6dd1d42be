"""What was decided about each candidate of a chunk, as the tokenising workers get it.

A candidate is a document that every rule and filter of its source kept; candidates of a chunk are numbered as `documents.read_chunk` meets them.
Owns: looking decisions up. Refuses: results that changed since they were written.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_prism.data_prep.cleaning.columns import checksum, read_column
from megatron_prism.data_prep.cleaning.words import without
from megatron_prism.data_prep.inputs import Position
from megatron_prism.errors import UserError

TYPES = {"verdict": ("u1", 1), "chunks": ("i8", 4), "cuts": ("i8", 3)}


class Decisions(NamedTuple):
    """Of one chunk. verdicts: one byte for each candidate; rules: the name of every verdict; cuts: characters to take out, by candidate."""

    verdicts: bytes
    rules: tuple[str, ...]
    cuts: dict[int, list[tuple[int, int]]]

    def of(self, number: int, text: str) -> tuple[str | None, str]:
        """(the rule that drops a candidate, or None; its text after the cuts)."""
        verdict = self.verdicts[number]
        return (self.rules[verdict] if verdict else None), (without(text, self.cuts[number]) if number in self.cuts else text)


class SourceDecisions:
    """The result of the pre-pass for one source. Errors: UserError where a file is not what its checksum says."""

    def __init__(self, folder: Path, rules: Sequence[str], checksums: dict[str, str]):
        for name, expected in checksums.items():
            path = folder / f"{name}.tmp"
            if not path.is_file() or checksum(path) != expected:
                raise UserError(f"{path} differs from its checksum: the result of cleaning was changed; remove the output folder and start anew")
        self._rules = tuple(rules)
        self._verdicts, self._chunks, self._cuts = (read_column(folder / f"{name}.tmp", *kind) for name, kind in TYPES.items())

    def counts(self) -> dict[str, int]:
        """Candidates by what was decided, those of no document left out."""
        return {rule: count for rule, count in zip(self._rules, np.bincount(self._verdicts, minlength=1).tolist(), strict=False) if count}

    def of(self, start: Position) -> Decisions | None:
        """The decisions on the chunk that begins there; None: all of it is kept as it is."""
        inputs, offsets = self._chunks[:, 0], self._chunks[:, 1]
        begin, end = np.searchsorted(inputs, start.input, "left"), np.searchsorted(inputs, start.input, "right")
        place = begin + np.searchsorted(offsets[begin:end], start.offset)
        assert place < end and offsets[place] == start.offset, f"no chunk of the pre-pass begins at {start}"
        first, count = int(self._chunks[place, 2]), int(self._chunks[place, 3])
        verdicts = self._verdicts[first : first + count]
        cuts = self._cuts[slice(*np.searchsorted(self._cuts[:, 0], [first, first + count]))].tolist()
        if not verdicts.any() and not cuts:
            return None
        grouped: dict[int, list[tuple[int, int]]] = {}
        for document, begins, ends in cuts:
            grouped.setdefault(document - first, []).append((begins, ends))
        return Decisions(verdicts.tobytes(), self._rules, grouped)
