"""Writing shards in a stream: a .bin of any size in constant memory (but for the document lengths), and its .idx.

Owns: one shard from its first token to its place on disk. Refuses shards to copy that changed; else what it is given is checked before.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prism import artifact
from megatron_prism.data_prep.manifest import BlockHasher, Shard
from megatron_prism.data_prep.masks import Bits, MaskWriter, read_whole
from megatron_prism.data_prep.shards import index_bytes, read_index
from megatron_prism.errors import UserError

COPY_BYTES = 1 << 22


class ShardWriter:
    """Writes one shard in a stream: the .bin under a temporary name, then both files put in place, on disk, whole or not at all.

    suffix: after .bin and .idx, for shards that are no part of the result.
    """

    def __init__(self, prefix: Path, dtype: str, suffix: str = ""):
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self.prefix, self.dtype, self.suffix = prefix, np.dtype(dtype), suffix
        self.text_bytes = 0
        # a name of its own: where locks do not work, two processes may join the same parts at once
        self._temporary = artifact.temporary_of(self._path("bin"))
        self._file = self._temporary.open("wb")
        self._lengths: list[NDArray[np.int32]] = []
        self._hasher = BlockHasher()
        self._mask: MaskWriter | None = None

    def add(self, tokens: NDArray[Any], lengths: NDArray[np.int32], text_bytes: int, answers: Bits | None = None) -> None:
        """Append documents: their ids end to end, the tokens of each, the UTF-8 bytes of their text together, and which ids are answers.

        Either every call says which are, and the shard has a mask, or none does.
        """
        self._add_answers(answers)
        assert tokens.dtype == self.dtype and len(tokens) == lengths.sum(dtype=np.int64), (tokens.dtype, len(tokens))
        data = np.ascontiguousarray(tokens).data.cast("B")
        self._file.write(data)
        self._hasher.update(data)
        self._lengths.append(lengths)
        self.text_bytes += text_bytes

    def _add_answers(self, answers: Bits | None) -> None:
        if self._mask is None and answers is not None and not self._lengths:
            self._mask = MaskWriter(self._path("mask"))
        assert (answers is None) == (self._mask is None), "documents with and without known answers in one shard"
        if self._mask is not None and answers is not None:
            self._mask.add(answers)

    def finish(self) -> Shard:
        """Put both files in place and describe them."""
        lengths = np.concatenate([np.zeros(0, np.int32), *self._lengths])
        index = index_bytes(lengths, self.dtype)
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.tell()
        self._file.close()
        self._temporary.replace(self._path("bin"))
        mask = self._mask.finish() if self._mask is not None else None
        artifact.write_atomic(self._path("idx"), index)  # also makes the renames above last
        digest = hashlib.sha256(index).hexdigest()
        return Shard(self.prefix.name, len(lengths), size // self.dtype.itemsize, size, len(index), digest, self._hasher.blocks(), mask)

    def copy(self, prefix: Path, suffix: str, text_bytes: int, known: Shard) -> None:
        """Append all documents of another shard. known: what was written there. Errors: UserError naming a file that changed since."""
        index, mask, data = (prefix.with_name(f"{prefix.name}.{kind}{suffix}") for kind in ("idx", "mask", "bin"))
        _check(index, hashlib.sha256(index.read_bytes()).hexdigest() == known.idx_sha256)
        lengths = read_index(index).lengths
        if known.mask is not None:
            _check(mask, _blocks_of(mask) == known.mask.blocks)
            for answers in read_whole(mask, known.tokens):
                self._add_answers(answers)
        self._lengths.append(lengths)
        hasher = BlockHasher()
        with data.open("rb") as file:
            while part := file.read(COPY_BYTES):
                self._file.write(part)
                self._hasher.update(part)
                hasher.update(part)
        _check(data, hasher.blocks() == known.blocks)
        self.text_bytes += text_bytes

    def _path(self, kind: str) -> Path:
        return self.prefix.with_name(f"{self.prefix.name}.{kind}{self.suffix}")

    def discard(self) -> None:
        """Give the shard up."""
        with suppress(OSError):  # what a full disk did not take
            self._file.close()
        self._temporary.unlink(missing_ok=True)
        if self._mask is not None:
            self._mask.discard()


def _blocks_of(path: Path) -> tuple[str, ...]:
    hasher = BlockHasher()
    hasher.update(path.read_bytes())
    return hasher.blocks()


def _check(path: Path, is_unchanged: bool) -> None:
    if not is_unchanged:
        raise UserError(f"{path} changed since it was written (a fault of the disk?); remove the output folder and prepare it again")
