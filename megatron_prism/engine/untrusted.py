"""Checkpoints are data, whoever wrote them: the pickles inside a torch_dist folder, read so that they cannot name code.

A pickle may name any function of any installed module and have it called. torch reads `.metadata` without a limit (torch 2.13,
distributed/checkpoint/filesystem.py:930) and stored objects too (default_planner.py:387), and megatron-core reads `common.pt` as torch's defaults
or the environment have it. Here `.metadata` is read by an unpickler that knows the few names that torch and megatron-core write, and everything else
with weights_only. Refuses, by name: whatever else a file names, and data files outside the checkpoint's folder.
"""

import contextlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, Metadata

from megatron_prism.artifact import inside
from megatron_prism.errors import UserError

NAMES = {
    "builtins": {"set", "frozenset", "slice", "complex", "bytearray"},
    "collections": {"OrderedDict", "defaultdict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "torch": {"Size", "device", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "megatron.core.dist_checkpointing.strategies.resharding": {"TensorReformulationMetadata"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("BytesStorageMetadata", "ChunkStorageMetadata", "TensorStorageMetadata"),
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"},
    "torch.serialization": {"_get_layout"},
}
"""Module -> what `.metadata` may name in it: classes that hold facts, and torch's look-up of a layout by its name."""

FORCE, FORBID = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
MADE = "a checkpoint that a training run wrote holds tensors and plain values; take it from a source you trust, or remove it"


class MetadataReader(FileSystemReader):
    """torch's reader of such folders, but `.metadata` can name facts alone, and no file outside the folder."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """As FileSystemReader's. Errors: UserError for a name that is not among NAMES, and for data files elsewhere."""
        path = Path(self.path) / ".metadata"
        with path.open("rb") as file:
            found = _Facts(file, path).load()
        if not isinstance(found, Metadata):
            raise UserError(f"{path} holds a {type(found).__name__}, not a checkpoint's metadata: the checkpoint is damaged")
        for name in {str(info.relative_path) for info in (found.storage_data or {}).values()}:
            inside(path.parent, name, path.name)
        return found


class _Facts(pickle.Unpickler):
    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if name not in NAMES.get(module, ()):
            raise UserError(f"{self.path} names {module}.{name}, which could run code when it is read; {MADE}")
        return super().find_class(module, name)


@contextlib.contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Inside, libraries may read the checkpoint in `folder`: its metadata was looked at, and every torch.load in this process is weights_only.

    Errors: UserError naming the folder and what one of its files names, before anything of it was called.
    """
    MetadataReader(folder).read_metadata()
    before = {name: os.environ.pop(name, None) for name in (FORCE, FORBID)}
    os.environ[FORCE] = "1"
    try:
        yield
    except (Exception, CheckpointException) as error:  # torch's is no Exception
        refusal = _refusal(error)
        if refusal is None:
            raise
        raise UserError(f"{folder} holds a file that could run code when it is read ({refusal}); {MADE}") from None
    finally:
        del os.environ[FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _refusal(error: BaseException) -> str | None:
    """What torch's weights_only loader refused, where that is why a load failed: the error may be wrapped, or be a text from another rank."""
    text = str(error)
    if "Weights only load failed" not in text and not isinstance(error, pickle.UnpicklingError):
        return None
    named = [line.strip() for line in text.splitlines() if "GLOBAL" in line or "nsupported" in line]
    return (named or text.splitlines() or [type(error).__name__])[0][:300]
