"""New weights as a Hugging Face folder beside an old one: the config and tokenizer of the old, the tensors of the new, written as they come.

For servers, which read a folder. It lies in shared memory (/dev/shm: files that are memory), so that servers of this machine map what was written and
no disk is touched; where that has no room, in temporary space, said once in the log. The one file grows as tensors come, in any order, and its header
is put before them at the end: no memory beyond one tensor.
Owns: that file. Refuses: names and shapes that are not the old folder's.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from functools import cache
from itertools import chain, islice
from math import prod
from pathlib import Path
from typing import IO, Any

from megatron_prism.errors import MachineError, UserError
from megatron_prism.generate.interface import NamedTensors
from megatron_prism.temporary import TemporaryFolder

SHARED = Path("/dev/shm")
FILE = "model.safetensors"
HEADER_BYTES = 200
"""at most, of one tensor's entry in the header without its name: type, sizes and place"""
SPARE_BYTES = 2**26
logger = logging.getLogger(__name__)


def new_folder(tensors: NamedTensors, like: Path) -> TemporaryFolder:
    """A folder of `tensors`, and links to everything else of `like`. Errors: UserError for names or shapes that differ from those of `like`;
    MachineError where this machine's memory or disk takes no more: another start may find room, or another machine."""
    stream, shapes = iter(tensors), _shapes(like)
    first = list(islice(stream, 1))
    size = sum(map(prod, shapes.values())) * (first[0][1].dtype.itemsize if first else 0)
    folder = TemporaryFolder("new-weights", parent_with_room(size))
    try:
        write_weights(chain(first, stream), like, folder.path)
    except OSError as error:
        folder.remove()
        raise MachineError(f"{folder.path.parent} took no new weights of about {size:,} bytes: {error}; make room there") from error
    except BaseException:
        folder.remove()
        raise
    return folder


def parent_with_room(size: int) -> Path | None:
    """Shared memory where it holds so many bytes; None: temporary space."""
    if SHARED.is_dir() and os.access(SHARED, os.W_OK) and shutil.disk_usage(SHARED).free > size + SPARE_BYTES:
        return SHARED
    _say_once(f"{SHARED} has no room for {size:,} bytes: new weights reach the servers through files in temporary space, which is slower")
    return None


@cache
def _say_once(text: str) -> None:
    logger.warning(text)


def write_weights(tensors: NamedTensors, like: Path, output: Path) -> None:
    """Write `tensors` and link everything else of `like`. Errors: as `new_folder`; the folder is then not whole."""
    shapes = _shapes(like)
    for beside in like.iterdir():
        if beside.is_file() and not beside.name.endswith((".safetensors", ".safetensors.index.json", ".bin")):
            (output / beside.name).symlink_to(beside.resolve())
    room = 8 + sum(len(name) + HEADER_BYTES for name in ["", *shapes]) // 8 * 8
    with (output / FILE).open("wb") as file:
        file.seek(room)
        entries = _append(tensors, shapes, file)
        missing = [name for name in _needed(like, shapes) if name not in entries]
        if missing:
            raise UserError(f"update_weights was not given {len(missing)} of the model's {len(shapes)} weights, such as {missing[0]}")
        header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
        assert 8 + len(header) <= room, (len(header), room)
        file.seek(0)
        file.write((room - 8).to_bytes(8, "little") + header.ljust(room - 8))


def _append(tensors: NamedTensors, shapes: Mapping[str, list[int]], file: IO[bytes]) -> dict[str, Any]:
    """Their bytes one after the other; the header's entries."""
    import torch

    from megatron_prism.engine.hf import DTYPES

    types = {dtype: name for name, dtype in DTYPES.items()}
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors:
        if name not in shapes:
            raise UserError(f"the model has no weight named {name!r}; update_weights takes the names of its Hugging Face folder")
        if list(tensor.shape) != shapes[name]:
            raise UserError(f"weight {name} has shape {tuple(shapes[name])} in the model, not {tuple(tensor.shape)}")
        if name in entries:
            raise UserError(f"update_weights was given {name} twice")
        entries[name] = {"dtype": types[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        file.write(memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))
        end += tensor.nbytes
    return entries


def _shapes(folder: Path) -> dict[str, list[int]]:
    """Names and shapes of a folder's tensors, from the files' headers."""
    from safetensors import safe_open

    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            shapes |= {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118 (not a dict)
    if not shapes:
        raise UserError(f"{folder} holds no safetensors files to take the names of the weights from")
    return shapes


def _needed(folder: Path, shapes: Mapping[str, list[int]]) -> list[str]:
    """The weights that a model cannot do without: an output layer that is the embedding may be stored, and need not be given."""
    tied = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("tie_word_embeddings")
    return [name for name in shapes if not (tied and name == "lm_head.weight")]
