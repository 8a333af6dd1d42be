"""Which tokens are answers: one bit for each token of a shard, in NAME.mask beside NAME.bin, written where the parts of a text are known.

Bit i % 8 of byte i // 8 (the lowest first) is token i of the .bin: any range is found without an index, an eighth of a byte a token.

Owns: the file. Refuses nothing but blocks that changed: they are compared with their checksums at first read, as those of a .bin are.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from megatron_prism import artifact
from megatron_prism.data_prep.answers import Bits
from megatron_prism.data_prep.manifest import BlockHasher, Manifest, Mask, ReadCheck
from megatron_prism.data_prep.shards import mask_path

READ_BYTES = 1 << 20


class MaskWriter:
    """One mask in a stream, under a temporary name until `finish`."""

    def __init__(self, path: Path) -> None:
        self.path, self.temporary = path, artifact.temporary_of(path)
        self._file = self.temporary.open("wb")
        self._hasher = BlockHasher()
        self._rest: Bits = np.zeros(0, dtype=bool)
        self._answers = 0

    def add(self, bits: Bits) -> None:
        """The bits of the next tokens."""
        self._answers += int(bits.sum())
        bits = np.concatenate([self._rest, bits])
        whole = len(bits) // 8 * 8
        self._write(bits[:whole])
        self._rest = bits[whole:]

    def finish(self) -> Mask:
        """Put the file in place and describe it; the caller makes the rename last."""
        self._write(self._rest)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self.temporary.replace(self.path)
        return Mask(self._answers, self._hasher.blocks())

    def discard(self) -> None:
        """Give the mask up."""
        with suppress(OSError):  # what a full disk did not take
            self._file.close()
        self.temporary.unlink(missing_ok=True)

    def _write(self, bits: Bits) -> None:
        data = np.packbits(bits, bitorder="little").data
        self._file.write(data)
        self._hasher.update(data)


def read_whole(path: Path, tokens: int) -> Iterator[Bits]:
    """All bits of a mask, some at a time; tokens: how many there are."""
    with path.open("rb") as file:
        while data := file.read(READ_BYTES):
            yield np.unpackbits(np.frombuffer(data, np.uint8), count=min(tokens, 8 * len(data)), bitorder="little").astype(bool)
            tokens -= 8 * len(data)


class MaskReader:
    """The masks of a split whose shards all have one (`Manifest.num_answers` is not None)."""

    def __init__(self, manifest: Manifest) -> None:
        assert manifest.num_answers is not None, manifest.folder
        self._bytes = [np.memmap(mask_path(prefix), np.uint8, "r") for prefix in manifest.prefixes]
        self._checks = ReadCheck(manifest, masks=True)

    def read(self, shard: int, first: int, count: int) -> Bits:
        """Which of the tokens [first, first + count) of a shard are answers. Errors: UserError naming a block that changed."""
        start, stop = first // 8, -(-(first + count) // 8)
        self._checks.check(shard, start, stop)
        bits = np.unpackbits(self._bytes[shard][start:stop], bitorder="little")
        return bits[first - 8 * start :][:count].astype(bool)
