"""torch_dist checkpoints, read and written one tensor at a time by one process, without a process group.

Owns: `Reader` (names, shapes, and any slice of a global tensor, however it was cut) and `write_streaming` (a folder that
megatron.core.dist_checkpointing loads at any layout). Peak memory: about one tensor and one stored chunk.
Layout of a folder, as megatron-core 0.16.1 writes it: `__RANK_N.distcp` files of concatenated torch.save records, `.metadata` (pickle: where each
chunk of each global tensor lies), `common.pt`, `metadata.json` (backend names). It holds through 0.19 for model weights.
What `Reader` reads is compared with its checksums first, block by block, where the folder has some (`checksums`); `write_streaming` takes them.
Refuses: folders that are not such checkpoints, damaged blocks, files shorter than their metadata says, unknown names, metadata that names code.
"""

import contextlib
import io
import json
import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import LoadPlan, Metadata
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner, ReadItem

from megatron_prism import checksums
from megatron_prism.artifact import sync_folder, write_atomic
from megatron_prism.engine.torch_private import StorageInfo
from megatron_prism.engine.untrusted import MetadataReader
from megatron_prism.errors import UserError

METADATA, COMMON, CONFIG = ".metadata", "common.pt", "metadata.json"
BACKENDS = json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1})


def is_sharded(folder: Path) -> bool:
    """Whether a folder is a torch_dist checkpoint."""
    return (folder / METADATA).is_file() and (folder / CONFIG).is_file()


class Reader:
    """One torch_dist checkpoint, opened for reading slices of its global tensors."""

    def __init__(self, folder: Path) -> None:
        """Read the metadata and check every file's size. Errors: UserError naming the folder or file that cannot be read."""
        self.folder = Path(folder)
        if not is_sharded(self.folder):
            raise UserError(f"{folder} is no torch_dist checkpoint: it must hold {METADATA} and {CONFIG}; a half-written one lacks them")
        _check_backend(self.folder)
        self._sums = checksums.read_table(self.folder)
        """None: nobody took any"""
        self._confirmed: set[tuple[str, int]] = set()
        self._confirm(METADATA, 0, (self.folder / METADATA).stat().st_size)
        self._storage = MetadataReader(self.folder)
        try:
            self._metadata: Metadata = self._storage.read_metadata()
        except (pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
            raise UserError(
                f"{self.folder / METADATA} cannot be read ({error}): the checkpoint is damaged, or of a library that is not installed"
            ) from None
        self._storage.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._tensors = {key: value for key, value in self._metadata.state_dict_metadata.items() if isinstance(value, TensorStorageMetadata)}
        self._check_files()

    def keys(self) -> list[str]:
        """Names of the global tensors."""
        return sorted(self._tensors)

    def objects(self) -> list[str]:
        """Names of the stored objects that are no tensors."""
        return sorted(self._metadata.state_dict_metadata.keys() - self._tensors.keys())

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a global tensor."""
        return tuple(self._entry(key).size)

    def dtype(self, key: str) -> torch.dtype:
        """Stored type of a global tensor."""
        return self._entry(key).properties.dtype

    def chunks(self, key: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """How a global tensor was cut: (offsets, sizes) of every stored chunk."""
        return [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in self._entry(key).chunks]

    def read(self, key: str, *index: int | slice) -> Tensor:
        """`tensor[index]` of a global tensor: integers drop their dimension, slices have step 1. Reads only the chunks that overlap.

        Errors: UserError when stored chunks do not cover what is asked for.
        """
        entry = self._entry(key)
        start, size = _box(tuple(entry.size), index)
        target = torch.empty(size, dtype=entry.properties.dtype)
        items = [item for chunk in entry.chunks if (item := _overlap(key, chunk, start, size)) is not None]
        covered = sum(item.lengths.numel() for item in items)
        if covered != target.numel():
            raise UserError(f"{self.folder}: the chunks of {key} cover {covered} of {target.numel()} elements asked for; the checkpoint is damaged")
        for item in items:
            info = self._metadata.storage_data[item.storage_index]
            self._confirm(info.relative_path, info.offset, info.length)
        self._storage.read_data(LoadPlan(items), _Into(target))
        return target[tuple(0 if isinstance(part, int) else slice(None) for part in index)]

    def _entry(self, key: str) -> TensorStorageMetadata:
        if key not in self._tensors:
            raise UserError(f"{self.folder} holds no tensor {key!r}")
        return self._tensors[key]

    def _confirm(self, name: str, offset: int, length: int) -> None:
        """Compare the blocks of a file that a record lies in with their checksums, each once. Errors: DamagedError."""
        if self._sums is None or name not in self._sums:
            return
        blocks = range(offset // checksums.BLOCK_BYTES, -(-(offset + length) // checksums.BLOCK_BYTES))
        new = [block for block in blocks if (name, block) not in self._confirmed]
        text = checksums.damage(self.folder / name, self._sums[name], new) if new else None
        if text is not None:
            raise checksums.DamagedError(f"{text}: the checkpoint is damaged; use another, or make it again")
        self._confirmed |= {(name, block) for block in new}

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for info in self._metadata.storage_data.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in sorted(ends.items()):
            path = self.folder / name
            found = path.stat().st_size if path.is_file() else None
            if found is None or found < end:
                state = "is missing" if found is None else f"has {found} bytes"
                raise UserError(f"{path} {state}, but {METADATA} needs {end} bytes: the checkpoint is half-written or was cut short")


class _Into(LoadPlanner):
    """Puts what the storage reader finds into one target tensor."""

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        place = tuple(slice(offset, offset + length) for offset, length in zip(read_item.dest_offsets, read_item.lengths, strict=True))
        return self.target[place]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None: ...
    def set_up_planner(self, *args: Any, **kwargs: Any) -> None: ...

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise NotImplementedError

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise NotImplementedError

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        raise NotImplementedError


def _check_backend(folder: Path) -> None:
    try:
        backend = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("sharded_backend")
    except (json.JSONDecodeError, AttributeError) as error:
        raise UserError(f"{folder / CONFIG} cannot be read ({error}): the checkpoint is damaged") from None
    if backend != "torch_dist":
        raise UserError(f"{folder} is a {backend!r} checkpoint; only torch_dist is supported: save it again with --ckpt-format torch_dist")


def _box(shape: tuple[int, ...], index: Sequence[int | slice]) -> tuple[list[int], list[int]]:
    """Start and size, in every dimension, of what an index asks for."""
    start, size = [0] * len(shape), list(shape)
    for axis, part in enumerate(index):
        first, last, step = part.indices(shape[axis]) if isinstance(part, slice) else (part, part + 1, 1)
        assert step == 1 and 0 <= first <= last <= shape[axis], (shape, index)
        start[axis], size[axis] = first, last - first
    return start, size


def _overlap(key: str, chunk: ChunkStorageMetadata, start: Sequence[int], size: Sequence[int]) -> ReadItem | None:
    """The part of a stored chunk that lies inside a box, as a read into the box; None where they do not meet."""
    low = [max(a, b) for a, b in zip(chunk.offsets, start, strict=True)]
    high = [min(a + n, b + m) for a, n, b, m in zip(chunk.offsets, chunk.sizes, start, size, strict=True)]
    if any(a >= b for a, b in zip(low, high, strict=True)):
        return None
    return ReadItem(
        type=LoadItemType.TENSOR,
        dest_index=MetadataIndex(key),
        dest_offsets=torch.Size([a - b for a, b in zip(low, start, strict=True)]),
        storage_index=MetadataIndex(key, chunk.offsets),
        storage_offsets=torch.Size([a - b for a, b in zip(low, chunk.offsets, strict=True)]),
        lengths=torch.Size([b - a for a, b in zip(low, high, strict=True)]),
    )


# --- writing -----------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """One tensor on its way into a checkpoint: all of a global tensor, or one layer of it."""

    key: str
    sections: Sequence[Tensor]
    """stacked along dimension 0; tensor parallelism cuts each section apart (a gated MLP's gate and up)"""
    layer: tuple[int, int] | None = None
    """(index, number of layers): the place on the leading layer axis"""
    tp_axis: int | None = None
    stage: int = 0
    """pipeline stage, 0 <= stage < pp: which group of files it goes to"""


@dataclass(frozen=True)
class EmptyObject:
    """A named non-tensor without content, such as the `_extra_state` that megatron-core's linear layers ask for."""

    key: str
    layer: tuple[int, int] | None
    """(index, number of layers): the place on the leading layer axis; None for an object of its own"""
    stage: int = 0


def write_streaming(folder: Path, pieces: Iterable[Piece | EmptyObject], tp: int = 1) -> int:
    """Write a torch_dist checkpoint from pieces as they come; returns the bytes written. Everything is on disk when it returns.

    tp: every piece with a `tp_axis` is stored in that many chunks (a load at any other size works all the same). `.metadata` and
    `metadata.json` come last, so a folder that was left half-written is no checkpoint.
    """
    with _Writer(folder, tp) as writer:
        for piece in pieces:
            if isinstance(piece, Piece):
                writer.add(piece)
            else:
                writer.add_object(piece)
        return writer.finish()


@dataclass
class _Writer:
    folder: Path
    tp: int
    metadata: dict[str, TensorStorageMetadata | BytesStorageMetadata] = field(default_factory=dict)
    places: dict[MetadataIndex, Any] = field(default_factory=dict)
    files: dict[str, checksums.Summing] = field(default_factory=dict)

    def __enter__(self) -> "_Writer":
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in [self.folder / METADATA, self.folder / CONFIG, self.folder / checksums.TABLE, *self.folder.glob("*.distcp")]:
            old.unlink(missing_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self.files.values():
            file.file.close()

    def add(self, piece: Piece) -> None:
        first = piece.sections[0]
        lead = [] if piece.layer is None else [1]
        rows = sum(section.shape[0] for section in piece.sections)
        shape = [*([] if piece.layer is None else [piece.layer[1]]), rows, *first.shape[1:]]
        entry = self.metadata.setdefault(piece.key, TensorStorageMetadata(TensorProperties(dtype=first.dtype), torch.Size(shape), []))
        assert isinstance(entry, TensorStorageMetadata) and entry.size == torch.Size(shape), (piece.key, shape, entry)
        if any(section.dtype != entry.properties.dtype for section in piece.sections):
            raise UserError(
                f"{piece.key} must have one type in all layers, but is {entry.properties.dtype} and {first.dtype}; choose one with --dtype"
            )
        row = 0
        for section in piece.sections:
            for rank, place, chunk in _cut(section, piece.tp_axis, self.tp):
                offsets = [*([] if piece.layer is None else [piece.layer[0]]), *place]
                offsets[len(lead)] += row
                where = torch.Size(offsets)
                entry.chunks.append(ChunkStorageMetadata(where, torch.Size([*lead, *chunk.shape])))
                self._save(alone(chunk).reshape(*lead, *chunk.shape), MetadataIndex(piece.key, where), piece.stage * self.tp + rank)
            row += section.shape[0]

    def add_object(self, piece: EmptyObject) -> None:
        index, count = piece.layer or (0, 1)
        name = f"{piece.key}/shard_{index}_{count}"
        self.metadata[name] = BytesStorageMetadata()
        self._save([None], MetadataIndex(name), piece.stage * self.tp)

    def finish(self) -> int:
        total = 0
        for file in self.files.values():
            file.sync()
            total += file.tell()
        write_atomic(self.folder / COMMON, _record({}))
        write_atomic(self.folder / METADATA, pickle.dumps(Metadata(cast(Any, self.metadata), storage_data=self.places)))
        sums = {name: file.checksum() for name, file in self.files.items()}
        sums |= {name: checksums.of_file(self.folder / name) for name in (COMMON, METADATA)} | {CONFIG: checksums.of_bytes(BACKENDS.encode())}
        write_atomic(self.folder / checksums.TABLE, checksums.to_text(sums))
        write_atomic(self.folder / CONFIG, BACKENDS)
        sync_folder(self.folder)
        return total

    def _save(self, value: Any, index: MetadataIndex, rank: int) -> None:
        name = f"__{rank}_0.distcp"
        if name not in self.files:
            self.files[name] = checksums.Summing((self.folder / name).open("wb"))
        file = self.files[name]
        start = file.tell()
        with without_crc():
            torch.save(value, file)
        self.places[index] = StorageInfo(name, start, file.tell() - start)


def _cut(section: Tensor, axis: int | None, parts: int) -> Iterator[tuple[int, list[int], Tensor]]:
    """(rank, offsets inside the section, chunk) for every non-empty one of `parts` cuts; near-equal where they do not divide."""
    if axis is None:
        yield 0, [0] * section.dim(), section
        return
    length = -(-section.shape[axis] // parts)
    for rank, chunk in enumerate(section.split(length, dim=axis)):
        yield rank, [rank * length if dimension == axis else 0 for dimension in range(section.dim())], chunk


def alone(tensor: Tensor) -> Tensor:
    """The same values with a storage of just their size (torch.save writes whole storages); no copy where they are contiguous."""
    tensor = tensor.contiguous()
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return torch.from_numpy(tensor.reshape(-1).view(torch.uint8).numpy()).view(tensor.dtype).reshape(tensor.shape)


@contextlib.contextmanager
def without_crc() -> Iterator[None]:
    """torch.load never compares the zip records' CRC, and computing it takes longer than writing."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _record(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
