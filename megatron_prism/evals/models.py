"""From a path to a Hugging Face folder that a backend can load: a folder as it is, a checkpoint, or a finished training run.

Owns: telling them apart, exporting into a temporary folder. Refuses: what is none of them, and whatever is not finished.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_prism import artifact
from megatron_prism.engine import run_folder
from megatron_prism.errors import UserError
from megatron_prism.temporary import TemporaryFolder

HASHED_BYTES = 1 << 16
READ_BESIDE_WEIGHTS = ("*.json", "*.jinja", "*.txt", "*.model", "additional_chat_templates/*")
"""files of a folder that decide what a model reads and where it ends: config, tokenizer, chat template"""


def is_hf_folder(path: Path) -> bool:
    """Whether a folder holds config.json and safetensors weights."""
    return (path / "config.json").is_file() and any(path.glob("*.safetensors"))


def find_model(path: Path) -> Path:
    """The Hugging Face folder or the checkpoint folder that a path stands for.

    A training run stands for its export (RUN/hf), else for its newest checkpoint. Errors: UserError for anything else, or unfinished.
    """
    if not path.is_dir():
        raise UserError(f"model path {path} is no folder; give a Hugging Face folder, a checkpoint or a finished training run")
    if (path / artifact.PROVENANCE).is_file() or (path / "checkpoints").is_dir():
        artifact.require(path)
    if is_hf_folder(path) or (path / "sharded").is_dir():
        return path
    if is_hf_folder(path / "hf"):
        return path / "hf"
    newest = run_folder.newest(path)
    if newest is None:
        raise UserError(f"{path} holds no model: neither config.json with *.safetensors, nor sharded/, nor a complete checkpoints/step_*")
    return newest


def fingerprint(path: Path) -> str:
    """What tells this model from another at the same path: the digest of an artifact, else one of a folder's config, tokenizer and chat template,
    of sizes and ends of its weights."""
    if artifact.is_complete(path):
        return artifact.digest(path)
    hasher = hashlib.sha256()
    for file in sorted({file for pattern in READ_BESIDE_WEIGHTS for file in path.glob(pattern)}):
        hasher.update(f"{file.name}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    for file in sorted(path.glob("*.safetensors")):
        hasher.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as weights:
            weights.seek(max(0, file.stat().st_size - HASHED_BYTES))
            hasher.update(weights.read())
    return hasher.hexdigest()


def export_once(path: Path, folder: Path) -> Path:
    """The model as a Hugging Face folder: `path` itself where it is one, else an export to `folder`, made where there is none."""
    found = find_model(path)
    if is_hf_folder(found):
        return found
    if not (folder / "config.json").is_file():  # the last file of an export
        from megatron_prism.engine.weights import export_hf

        export_hf(found, folder, None)
    return folder


@contextmanager
def hf_folder(path: Path) -> Iterator[Path]:
    """The model as a Hugging Face folder; an export of a checkpoint is removed at the end."""
    found = find_model(path)
    if is_hf_folder(found):
        yield found
        return
    from megatron_prism.engine.weights import export_hf

    with TemporaryFolder("export") as temporary:
        exported = temporary.path / "hf"
        export_hf(found, exported, None)
        yield exported
