"""The token stream of a split of shards, read without the engine: memory-mapped, block checksums compared at first read."""

import numpy as np
from numpy.typing import NDArray

from megatron_prism.data_prep.manifest import Manifest, ReadCheck
from megatron_prism.data_prep.shards import bin_path


class TokenStream:
    """All documents of a split, one after the other, each with its end-of-document id, as one read-only array over several files."""

    def __init__(self, manifest: Manifest):
        self.manifest = manifest
        self._check = ReadCheck(manifest)
        self._runs = manifest.runs()
        files = {number: np.memmap(bin_path(manifest.prefixes[number]), manifest.dtype, "r") for number, _, _ in self._runs}
        self._parts = [files[number][start : start + length] for number, start, length in self._runs]
        self._ends = np.cumsum([len(part) for part in self._parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, length: int) -> NDArray[np.int64]:
        """Tokens [start, start + length), int64. Errors: UserError where a block differs from its checksum."""
        assert 0 <= start <= start + length <= len(self), (start, length, len(self))
        pieces = []
        while length:
            place = int(np.searchsorted(self._ends, start, side="right"))
            part = self._parts[place]
            inside = start - (int(self._ends[place]) - len(part))
            taken = min(length, len(part) - inside)
            number, first, _ = self._runs[place]
            self._check.check(number, (first + inside) * part.itemsize, (first + inside + taken) * part.itemsize)
            pieces.append(np.asarray(part[inside : inside + taken], dtype=np.int64))
            start, length = start + taken, length - taken
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)
