"""An output folder that explains itself: `config.toml`, `provenance.json`, and `COMPLETE`, written last.

    runs/midtrain/
      config.toml       the resolved config, every default spelled out
      provenance.json   schema version, stage, time, git commit, versions, command, host, parents with their digests
      ...               what the stage made
      COMPLETE          sizes of all files and the digest that children record; no COMPLETE, no reading

Owns: beginning, completing and reading such folders, and single files written whole or not at all.
Refuses: a folder without COMPLETE, a file that changed size since, a newer schema, overwriting a finished artifact made from something else.
Called on one rank only; no torch here.
"""

import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from megatron_prism import __version__
from megatron_prism.config import config_hash, to_toml
from megatron_prism.errors import UserError

SCHEMA_VERSION = 1
COMPLETE = "COMPLETE"
PROVENANCE = "provenance.json"
CONFIG = "config.toml"
RECORDED_PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "tokenizers", "safetensors", "numpy", "pydantic")
HASH_CONTENT_UP_TO_BYTES = 1 << 20


def begin(folder: Path, kind: str, config: BaseModel, parents: Sequence[Path] = ()) -> Path:
    """Make `folder` and record what is about to be made in it.

    kind: the stage's name, checked when the folder is read back. parents: the finished artifacts it is made from.
    A folder that exists without COMPLETE is taken up again (its stage decides what it can reuse); one that is COMPLETE is opened again only
    by the same config and parents. Errors: UserError for an unfinished parent, or another run's finished folder.
    """
    provenance = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "id": uuid.uuid4().hex,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "config_hash": config_hash(config),
        "parents": {str(parent): digest(parent) for parent in parents},
        "command": sys.argv,
        "commit": git_commit(),
        "versions": {"megatron-prism": __version__, "python": platform.python_version(), **package_versions()},
        "host": {"name": socket.gethostname(), "cpus": os.cpu_count(), "system": platform.platform()},
    }
    if is_complete(folder) and not is_current(folder, config, parents):
        raise UserError(f"{folder} is a finished {kind} of another config or other parents; choose another output or remove the folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / COMPLETE).unlink(missing_ok=True)
    write_atomic(folder / CONFIG, to_toml(config))
    write_atomic(folder / PROVENANCE, json.dumps(provenance, indent=2) + "\n")
    return folder


def complete(folder: Path) -> str:
    """Write COMPLETE: the size of every file, and the folder's digest (returned), a sha256 that children record as their parent's hash.

    Small files (up to 1 MiB) enter the digest by content, larger ones by size; provenance.json, with its unique id, is always among them.
    """
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in _files(folder)}
    hasher = hashlib.sha256()
    for name, size in sizes.items():
        hasher.update(f"{name}\0{size}\0".encode())
        if size <= HASH_CONTENT_UP_TO_BYTES:
            hasher.update((folder / name).read_bytes())
    record = {
        "schema_version": SCHEMA_VERSION,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "digest": hasher.hexdigest(),
        "files": sizes,
    }
    write_atomic(folder / COMPLETE, json.dumps(record, indent=1) + "\n")
    return record["digest"]


def require(folder: Path, kind: str | None = None) -> dict[str, Any]:
    """The provenance of a finished artifact, after checking that every file it recorded is there in its size.

    Errors: UserError naming the folder when it is missing, unfinished, of another kind, of a newer schema, or was changed.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; run the stage that makes it")
    if not is_complete(folder):
        raise UserError(
            f"{folder} has no {COMPLETE} mark: it is half-written or its stage is still running; "
            "run that stage again with the same output (it continues where it can), or remove the folder"
        )
    record, provenance = _read_json(folder / COMPLETE), _read_json(folder / PROVENANCE)
    for part in (record, provenance):
        if part.get("schema_version", 0) > SCHEMA_VERSION:
            raise UserError(f"{folder} has artifact schema {part['schema_version']}, this version reads up to {SCHEMA_VERSION}; upgrade megatron-prism")
    if kind is not None and provenance["kind"] != kind:
        raise UserError(f"{folder} is a {provenance['kind']}, but a {kind} is needed here")
    for name, size in record["files"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise UserError(f"{folder / name} {state}, {COMPLETE} says {size} bytes: the artifact was changed; make it again")
    return provenance


def is_complete(folder: Path) -> bool:
    """Whether the folder carries its COMPLETE mark."""
    return (folder / COMPLETE).is_file()


def digest(folder: Path) -> str:
    """The digest of a finished artifact. Errors: UserError as for `require`."""
    require(folder)
    return str(_read_json(folder / COMPLETE)["digest"])


def is_current(folder: Path, config: BaseModel, parents: Sequence[Path] = ()) -> bool:
    """Whether `folder` is finished and was made from this very config and these very parents."""
    if not is_complete(folder):
        return False
    provenance = require(folder)
    same_parents = provenance["parents"] == {str(parent): digest(parent) for parent in parents if is_complete(parent)}
    return same_parents and provenance["config_hash"] == config_hash(config)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def git_commit() -> str | None:
    """The commit of the installed source tree, with `+changes` when files differ from it; None outside git."""
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that decide results."""
    versions = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _files(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder) != Path(COMPLETE))
    return sorted(path for path in found if not path.name.endswith(".tmp"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): the artifact was changed; make it again") from None
