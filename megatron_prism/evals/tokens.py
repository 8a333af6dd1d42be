"""The token stream of a split of shards, read without the engine: memory-mapped, block checksums compared at first read."""

import numpy as np
from numpy.typing import NDArray

from megatron_prism.data_prep.manifest import Manifest, ReadCheck


class TokenStream:
    """All documents of a split, one after the other, each with its end-of-document id, as one read-only array over several files."""

    def __init__(self, manifest: Manifest):
        self.manifest = manifest
        self._check = ReadCheck(manifest)
        self._parts = [
            np.memmap(prefix.with_suffix(".bin"), manifest.dtype, "r") for prefix in manifest.prefixes if prefix.with_suffix(".bin").stat().st_size
        ]
        self._numbers = [number for number, shard in enumerate(manifest.shards) if shard.tokens]
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
            self._check.check(self._numbers[place], inside * part.itemsize, (inside + taken) * part.itemsize)
            pieces.append(np.asarray(part[inside : inside + taken], dtype=np.int64))
            start, length = start + taken, length - taken
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)
