"""Hugging Face folders: safetensors read and written one tensor at a time, and the small files (config, tokenizer, ...) carried along.

Owns: `Reader` (every weight of a folder, by name), `write_weights` (a stream of tensors into shards with an index), `carry_files`, and the type that
config.json declares. Refuses, naming file and tensor: missing or truncated shards, an index that lists what its files do not
hold or leaves out what they do, pickled .bin weights, half-written outputs of our own.
"""

import ctypes
import json
import mmap
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_prism import artifact, families
from megatron_prism.errors import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MAX_SHARD_BYTES = 5_000_000_000
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of types"""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".ot", ".onnx", ".npz"}
OWN_FILES = {artifact.CONFIG, artifact.PROVENANCE, artifact.COMPLETE}


@dataclass(frozen=True)
class Entry:
    """What a weight file says of one tensor."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class Reader:
    """The weights of one Hugging Face folder. One shard is mapped at a time; tensors are views of it."""

    def __init__(self, folder: Path) -> None:
        """Open and check every shard's header. Errors: UserError naming the file or tensor that is missing, truncated or unlisted."""
        self.folder = Path(folder)
        if (self.folder / artifact.PROVENANCE).is_file():
            artifact.require(self.folder)
        listed = _listed(self.folder)
        files = sorted(set(listed.values())) if listed is not None else [SINGLE]
        self.entries: dict[str, Entry] = {}
        for file in files:
            for name, entry in _header(self.folder, file).items():
                if name in self.entries:
                    raise UserError(f"{self.folder}: tensor {name} is stored twice, in {self.entries[name].file} and in {file}")
                self.entries[name] = entry
        if listed is not None:
            self._check_index(listed)
        self._open: tuple[str, Any] = ("", None)

    def tensor(self, name: str) -> Tensor:
        """One tensor, as a view of its mapped file."""
        file = self.entries[name].file
        if self._open[0] != file:
            self._open = (file, safe_open(self.folder / file, framework="pt"))
        found: Tensor = self._open[1].get_tensor(name)
        _read_ahead(found)
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(torch.Size(entry.shape).numel() * entry.dtype.itemsize for entry in self.entries.values())

    def _check_index(self, listed: dict[str, str]) -> None:
        ghosts = sorted(name for name, file in listed.items() if name not in self.entries or self.entries[name].file != file)
        if ghosts:
            raise UserError(f"{self.folder / INDEX} lists {_some(ghosts)} in {listed[ghosts[0]]}, which does not hold it; the folder is incomplete")
        unlisted = sorted(self.entries.keys() - listed.keys())
        if unlisted:
            raise UserError(f"{self.folder / self.entries[unlisted[0]].file} holds {_some(unlisted)}, which {INDEX} does not list")


def _read_ahead(mapped: Tensor) -> bool:
    """Have the system fetch the rest of a mapped tensor while its first part is worked on. Advice: without it (False) nothing else changes."""
    if sys.platform != "linux" or not mapped.nbytes:
        return False
    start = mapped.data_ptr()
    page = start - start % mmap.PAGESIZE
    return not ctypes.CDLL(None).madvise(ctypes.c_void_p(page), ctypes.c_size_t(start + mapped.nbytes - page), mmap.MADV_WILLNEED)


def _listed(folder: Path) -> dict[str, str] | None:
    """The index's weight map; None for a folder with one file. Errors: UserError where there are no safetensors."""
    if (folder / INDEX).is_file():
        try:
            weight_map: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{folder / INDEX} cannot be read: {error!r}") from None
        for file in sorted(set(weight_map.values())):
            artifact.inside(folder, file, INDEX, links=True)
        return weight_map
    if (folder / SINGLE).is_file():
        return None
    if any(folder.glob("pytorch_model*.bin")):
        raise UserError(
            f"{folder} holds pickled weights (pytorch_model.bin), which can run any code when read; convert it first: python -c "
            f"\"from transformers import AutoModelForCausalLM as A; A.from_pretrained('{folder}').save_pretrained('OUT')\""
        )
    raise UserError(f"{folder} holds neither {SINGLE} nor {INDEX}; give a folder with safetensors weights")


def _header(folder: Path, file: str) -> dict[str, Entry]:
    if not (folder / file).is_file():
        raise UserError(f"{folder / file} is missing, though {INDEX} lists it; fetch the folder again")
    try:
        with safe_open(folder / file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            return {name: Entry(file, tuple(part.get_shape()), _dtype(part.get_dtype(), name)) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / file} is truncated or no safetensors file ({error}); fetch it again") from None


def _dtype(name: str, tensor: str) -> torch.dtype:
    if name not in DTYPES:
        raise UserError(f"tensor {tensor} has type {name}, which is not supported")
    return DTYPES[name]


def _some(names: Sequence[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


# --- writing -----------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """One tensor that is going to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def shards(plan: Sequence[Planned], max_shard_bytes: int = MAX_SHARD_BYTES) -> dict[str, list[Planned]]:
    """File name -> its tensors, in order; no file above the limit unless one tensor is. transformers' names: one file has no number."""
    groups: list[list[Planned]] = [[]]
    size = 0
    for item in plan:
        if groups[-1] and size + item.nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += item.nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{index:05d}-of-{len(groups):05d}.safetensors": group for index, group in enumerate(groups, 1)}


def write_weights(folder: Path, plan: Sequence[Planned], tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int = MAX_SHARD_BYTES) -> list[str]:
    """Write tensors, which come in the order of `plan`, into safetensors shards; returns the file names. Peak memory: one tensor.

    Each file gets its name only when it is whole, the index comes last. The cast to a planned type is done here. Other weights in the folder,
    from an earlier attempt, are removed.
    """
    for old in [*folder.glob("*.safetensors"), folder / INDEX]:
        old.unlink(missing_ok=True)
    files = shards(plan, max_shard_bytes)
    stream = iter(tensors)
    for file, group in files.items():
        _write_file(folder / file, group, stream)
    assert next(stream, None) is None, "more tensors than planned"
    if len(files) > 1:
        weight_map = {item.name: file for file, group in files.items() for item in group}
        index = {"metadata": {"total_size": sum(item.nbytes for item in plan)}, "weight_map": dict(sorted(weight_map.items()))}
        artifact.write_atomic(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return list(files)


def _write_file(path: Path, group: Sequence[Planned], stream: Iterator[tuple[str, Tensor]]) -> None:
    temporary = artifact.temporary_of(path)
    with temporary.open("wb") as file:
        _write_header(file, group)
        for item in group:
            name, tensor = next(stream)
            assert name == item.name and tuple(tensor.shape) == item.shape, (name, item, tensor.shape)
            values = tensor.to(item.dtype).contiguous()
            file.write(memoryview(values.reshape(-1).view(torch.uint8).numpy()))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _write_header(file: IO[bytes], group: Sequence[Planned]) -> None:
    """The safetensors header: its length (8 bytes, little endian), then JSON padded with spaces to a multiple of 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for item in group:
        header[item.name] = {"dtype": _NAMES[item.dtype], "shape": list(item.shape), "data_offsets": [offset, offset + item.nbytes]}
        offset += item.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


# --- the files beside the weights --------------------------------------------------------------------------------------------------------------


def carry_files(source: Path, target: Path, leave: Iterable[str] = ()) -> list[str]:
    """Copy config, tokenizer, generation config, chat templates, ... byte for byte; returns their names. Weights, hidden and artifact files stay."""
    target.mkdir(parents=True, exist_ok=True)
    skipped = {*OWN_FILES, *leave}
    carried = []
    for path in sorted([*source.glob("*"), *source.glob("additional_chat_templates/*")]):
        name = str(path.relative_to(source))
        weights = path.suffix in WEIGHT_SUFFIXES or name.endswith((".safetensors.index.json", ".bin.index.json"))
        if path.is_file() and not weights and not name.startswith(".") and name not in skipped:
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target / name)
            carried.append(name)
    return carried


def declared_dtype(config: dict[str, Any]) -> torch.dtype | None:
    """The type that config.json names (`dtype`, or `torch_dtype` as before transformers 5); None where it names none."""
    name = config.get("dtype") or config.get("torch_dtype")
    found = getattr(torch, str(name).removeprefix("torch."), None)
    return found if isinstance(found, torch.dtype) else None


def publish_config(config_file: Path) -> None:
    """Add what older readers need of a config.json (`families.export_config`). One that lacks nothing stays byte for byte as it is."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    exported = families.export_config(config)
    if exported != config:
        artifact.write_atomic(config_file, json.dumps(exported, indent=2, ensure_ascii=False) + "\n")


def declare_dtype(config_file: Path, dtype: torch.dtype) -> None:
    """Make config.json name this type. A config that already does stays byte for byte as it is."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if declared_dtype(config) == dtype:
        return
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    for key in keys:
        config[key] = str(dtype).removeprefix("torch.")
    artifact.write_atomic(config_file, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
