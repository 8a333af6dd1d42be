"""What a folder of shards holds, and whether it still does: `manifest.json` beside the shards of one split of one source.

A manifest of adopted shards (`data_prep/adopt`) lists files that lie elsewhere, and may choose among their documents; its schema is 2, that of shards
with masks (`masks`) 3, that of all others 1.

Owns: reading and writing it, the quick check at training start (sizes and .idx hashes), and the checksums of the .bin files, one per block, that are
compared at first read (pools are terabytes) or all at once. Refuses: folders without a manifest, unfinished ones, and any byte that changed.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_prism import artifact
from megatron_prism.data_prep import shards as shard_format
from megatron_prism.data_prep.held_out import held_out
from megatron_prism.data_prep.shards import bin_path, idx_path, mask_path
from megatron_prism.errors import UserError

SCHEMA_VERSION = 3
MANIFEST = "manifest.json"
BLOCK_BYTES = 1 << 20
"""Of new shards: the first sample in a block waits until all of it is read and hashed, and a checksum costs 24 bytes of manifest. Before: 64 MiB."""
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Mask:
    """The .mask of a shard. answers: how many of its tokens are; blocks: as the shard's, of this file."""

    answers: int
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class Shard:
    """One .bin/.idx pair. blocks: xxh3-64 of each BLOCK_BYTES of the .bin, in hex; tokens count the end-of-document ids.

    name: path without suffix, from the manifest's folder on; adopted shards' may be absolute. mask: None where nobody knows which tokens are answers.
    """

    name: str
    documents: int
    tokens: int
    bin_bytes: int
    idx_bytes: int
    idx_sha256: str
    blocks: tuple[str, ...]
    mask: Mask | None = None

    @classmethod
    def read(cls, content: dict[str, Any]) -> "Shard":
        """A shard as JSON keeps it."""
        mask = content.get("mask")
        return cls(**{**content, "blocks": tuple(content["blocks"]), "mask": Mask(mask["answers"], tuple(mask["blocks"])) if mask else None})


@dataclass(frozen=True)
class Selection:
    """Which documents of the listed shards are the split's: those that `held_out` chooses, or those that it leaves; documents, tokens: of these."""

    seed: int
    fraction: float
    held_out: bool
    documents: int
    tokens: int


@dataclass(frozen=True)
class Manifest:
    """The shards of one split of one source, in order: document d of the source is counted through them.

    text_bytes: UTF-8 bytes of the documents' text (0 where nobody knows). inputs: the files it was made from ({"path", "bytes", "fingerprint"}).
    adopted: the shards are another tool's; every sequence of their indices is a document. selection: none, all documents are of this split.
    """

    folder: Path
    source: str
    split: str
    tokenizer_hash: str
    vocab_size: int
    end_of_document: int
    dtype: str
    text_bytes: int
    shards: tuple[Shard, ...]
    inputs: tuple[dict[str, Any], ...] = ()
    block_bytes: int = BLOCK_BYTES
    adopted: bool = False
    selection: Selection | None = None

    @property
    def schema_version(self) -> int:
        """The oldest schema that can say this."""
        if any(shard.mask for shard in self.shards):
            return 3
        return 2 if self.adopted or self.selection else 1

    @property
    def num_documents(self) -> int:
        """Documents of the split, over all shards."""
        return self.selection.documents if self.selection else sum(shard.documents for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        """Tokens of these, end-of-document ids included."""
        return self.selection.tokens if self.selection else sum(shard.tokens for shard in self.shards)

    @property
    def num_answers(self) -> int | None:
        """Of the tokens, how many are answers; None where nobody knows."""
        known = [shard.mask.answers for shard in self.shards if shard.mask is not None]
        return sum(known) if known and len(known) == len(self.shards) else None

    @property
    def prefixes(self) -> list[Path]:
        """Each shard's path without suffix, as megatron-core's IndexedDataset takes it."""
        return [self.folder / shard.name for shard in self.shards]

    def document_lengths(self) -> NDArray[np.int32]:
        """Tokens per document over all shards in order, int32 [documents of the shards], read from the .idx files.

        A document that the selection leaves out keeps its place, with a length of 0: nobody who reads by these lengths ever sees it.
        """
        parts = self._lengths_by_shard()
        lengths = np.concatenate([np.zeros(0, np.int32), *parts])
        if self.selection is not None:
            lengths[~self.chosen(0, len(lengths))] = 0
        return lengths

    def runs(self) -> list[tuple[int, int, int]]:
        """Where the split's tokens lie: (shard, first token, tokens), documents next to each other joined."""
        if self.selection is None:
            return [(number, 0, shard.tokens) for number, shard in enumerate(self.shards) if shard.tokens]
        found: list[tuple[int, int, int]] = []
        first = 0
        for number, lengths in enumerate(self._lengths_by_shard()):
            starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
            edges = np.flatnonzero(np.diff(self.chosen(first, len(lengths)).astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
            spans = starts[edges]
            found += [(number, int(start), int(stop - start)) for start, stop in spans if stop > start]
            first += len(lengths)
        return found

    def _lengths_by_shard(self) -> list[NDArray[np.int32]]:
        parts = []
        for shard, prefix in zip(self.shards, self.prefixes, strict=True):
            index = shard_format.read_index(idx_path(prefix), each_sequence=self.adopted)
            if (len(index.lengths), int(index.lengths.sum(dtype=np.int64)), index.dtype) != (shard.documents, shard.tokens, self.dtype):
                raise UserError(
                    f"{prefix}.idx does not hold the {shard.documents} documents that {self.folder / MANIFEST} names; prepare the data again"
                )
            parts.append(index.lengths)
        return parts

    def chosen(self, first: int, count: int) -> NDArray[np.bool_]:
        """Which of the documents first .. first + count - 1 of the shards belong to the split."""
        if self.selection is None:
            return np.ones(count, dtype=bool)
        held = held_out(self.selection.seed, self.source, first, count, self.selection.fraction)
        return held if self.selection.held_out else ~held

    def digest(self, answers: bool = False) -> str:
        """sha256 over what decides the tokens: every .idx hash and block checksum. A run records it and refuses silently changed data.

        answers: over the masks too.
        """
        decisive: list[Any] = [self.dtype, self.end_of_document, self.tokenizer_hash, [(shard.idx_sha256, shard.blocks) for shard in self.shards]]
        if self.selection is not None:
            decisive.append([self.source, *asdict(self.selection).values()])
        if answers:
            decisive.append([shard.mask.blocks if shard.mask else None for shard in self.shards])
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


def write_manifest(manifest: Manifest) -> Path:
    """Write `manifest.json` into the manifest's folder, whole or not at all."""
    newer = () if manifest.adopted or manifest.selection else ("adopted", "selection")
    content = {key: value for key, value in asdict(manifest).items() if key not in ("folder", *newer)}
    content["shards"] = [{key: value for key, value in shard.items() if key != "mask" or value} for shard in content["shards"]]
    content["schema_version"] = manifest.schema_version
    totals = {"num_documents": manifest.num_documents, "num_tokens": manifest.num_tokens}
    artifact.write_atomic(manifest.folder / MANIFEST, json.dumps(content | totals, indent=1) + "\n")
    return manifest.folder / MANIFEST


def load_manifest(folder: Path) -> Manifest:
    """The manifest of a split, as `NAME/train` of a prep output.

    Errors: UserError when it is missing, unfinished, of a newer schema, or lists shards outside its folder without being `adopt`'s.
    """
    folder = Path(folder)
    prep_output = folder.parent.parent
    if (prep_output / artifact.PROVENANCE).is_file() and not artifact.is_complete(prep_output):
        artifact.require(prep_output)
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} has no {MANIFEST}; give a split folder that `prism prep` wrote, such as OUTPUT/NAME/train") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{folder / MANIFEST} cannot be read ({error}): it was changed; prepare the data again") from None
    if content["schema_version"] > SCHEMA_VERSION:
        raise UserError(
            f"{folder / MANIFEST} has schema {content['schema_version']}, this version reads up to {SCHEMA_VERSION}; upgrade megatron-prism"
        )
    shards = tuple(Shard.read(shard) for shard in content.pop("shards"))
    selection = Selection(**chosen) if (chosen := content.pop("selection", None)) else None
    known = {key: value for key, value in content.items() if key not in ("num_documents", "num_tokens", "inputs", "schema_version")}
    manifest = Manifest(folder=folder, shards=shards, inputs=tuple(content["inputs"]), selection=selection, **known)
    if not manifest.adopted:
        _check_inside(manifest)
    return manifest


def _check_inside(manifest: Manifest) -> None:
    """Shards that `prism prep` wrote lie beside their manifest. Adopted ones lie elsewhere: `prism adopt` was told where."""
    for shard in manifest.shards:
        for path in (bin_path, idx_path, *((mask_path,) if shard.mask else ())):
            artifact.inside(manifest.folder, str(path(Path(shard.name))), MANIFEST)


def verify(folder: Path, full: bool = False) -> Manifest:
    """Check a split against its manifest, and return it.

    Always: every file is there in its size, and every .idx has its sha256 (seconds, at training start). full: every block of every .bin too.
    Errors: UserError naming the file, and the block, that changed.
    """
    manifest = load_manifest(folder)
    for shard, prefix in zip(manifest.shards, manifest.prefixes, strict=True):
        check_size(bin_path(prefix), shard.bin_bytes)
        check_size(idx_path(prefix), shard.idx_bytes)
        if shard.mask is not None:
            check_size(mask_path(prefix), -(-shard.tokens // 8))
        if file_sha256(idx_path(prefix)) != shard.idx_sha256:
            raise UserError(f"{prefix}.idx differs from its checksum in {manifest.folder / MANIFEST}: the data was changed; prepare it again")
    if full:
        checks = [ReadCheck(manifest), *([ReadCheck(manifest, masks=True)] if manifest.num_answers is not None else [])]
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            for check in checks:
                list(pool.map(check.check_all, range(len(manifest.shards))))
    return manifest


class ReadCheck:
    """Compares each block of a split with its checksum the first time it is read.

    Called by whoever reads tokens, on every rank for what that rank reads; remembers the blocks that it has seen. masks: of the .mask files instead.
    """

    def __init__(self, manifest: Manifest, masks: bool = False):
        self.manifest = manifest
        self._paths = [(mask_path if masks else bin_path)(prefix) for prefix in manifest.prefixes]
        self._blocks = [shard.mask.blocks if masks and shard.mask else shard.blocks for shard in manifest.shards]
        self._seen = [np.zeros(len(blocks), dtype=bool) for blocks in self._blocks]

    def check(self, shard: int, start: int, stop: int) -> None:
        """Check the blocks of one file that hold the bytes [start, stop). Errors: UserError naming file and block."""
        size = self.manifest.block_bytes
        for block in range(start // size, -(-stop // size)):
            if not self._seen[shard][block]:
                self._check_block(shard, block)
                self._seen[shard][block] = True

    def check_all(self, shard: int) -> None:
        """Check every block of one file."""
        self.check(shard, 0, len(self._blocks[shard]) * self.manifest.block_bytes)

    def _check_block(self, shard: int, block: int) -> None:
        path, size = self._paths[shard], self.manifest.block_bytes
        with path.open("rb") as file:
            file.seek(block * size)
            found = _hash_part(file, size)
        if found != self._blocks[shard][block]:
            raise UserError(
                f"{path}, block {block} (bytes {block * size} to {min((block + 1) * size, path.stat().st_size)}) differs from its "
                f"checksum in {self.manifest.folder / MANIFEST}: the data was changed or the disk fails; copy it again or prepare it again"
            )


class BlockHasher:
    """xxh3-64 of every block of a stream of bytes, as it is written."""

    def __init__(self, block_bytes: int = BLOCK_BYTES):
        self.block_bytes = block_bytes
        self._done: list[str] = []
        self._current, self._room = xxhash.xxh3_64(), block_bytes

    def update(self, data: bytes | memoryview) -> None:
        """Take more bytes."""
        view = memoryview(data).cast("B")
        while len(view):
            part, view = view[: self._room], view[self._room :]
            self._current.update(part)
            self._room -= len(part)
            if self._room == 0:
                self._done.append(self._current.hexdigest())
                self._current, self._room = xxhash.xxh3_64(), self.block_bytes

    def blocks(self) -> tuple[str, ...]:
        """The checksums so far; the last block may be short."""
        return tuple(self._done if self._room == self.block_bytes else [*self._done, self._current.hexdigest()])


def file_sha256(path: Path) -> str:
    """sha256 of a file, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_one_tokenizer(manifests: Sequence[Manifest]) -> None:
    """Errors: UserError naming two splits that were made with different tokenizers."""
    for first, other in pairwise(manifests):
        if (other.tokenizer_hash, other.end_of_document) != (first.tokenizer_hash, first.end_of_document):
            raise UserError(f"{other.folder} and {first.folder} were made with different tokenizers; prepare all sources of a blend with one")


def check_size(path: Path, size: int) -> None:
    """Errors: UserError for a file of a manifest that is missing or has another size."""
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        state = "is missing" if found is None else f"has {found} bytes"
        raise UserError(f"{path} {state}, its manifest says {size} bytes: the data was changed; copy it again or prepare it again")


def _hash_part(file: BinaryIO, size: int) -> str:
    hasher = xxhash.xxh3_64()
    while size and (data := file.read(min(size, READ_BYTES))):
        hasher.update(data)
        size -= len(data)
    return hasher.hexdigest()
