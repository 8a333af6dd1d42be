"""An output folder that explains itself: `config.toml`, `provenance.json`, and `COMPLETE`, written last.

    runs/midtrain/
      config.toml       the resolved config, every default spelled out
      provenance.json   schema version, stage, time, git commit, versions, command, host, parents with their digests
      ...               what the stage made
      COMPLETE          sizes of all files and the digest that children record; no COMPLETE, no reading. Of a checkpoint: checksums too,
                        but for files that stand in a table beside them (`checksums`)

Owns: beginning, completing and reading such folders, and single files written whole or not at all.
Refuses: a folder without COMPLETE, a file that changed size since, a newer schema, a folder that holds something else, and overwriting
a finished artifact that was made from another config or from parents that were made again since.
Called on one rank only; no torch here.
"""

import hashlib
import json
import os
import platform
import sys
import tomllib
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from megatron_prism import __version__, checksums, secrets
from megatron_prism.checksums import Checksum
from megatron_prism.config import config_hash, resolved, to_toml
from megatron_prism.differences import differences
from megatron_prism.errors import UserError
from megatron_prism.surroundings import git_commit, host_shape, package_versions

SCHEMA_VERSION = 1
COMPLETE = "COMPLETE"
PROVENANCE = "provenance.json"
CONFIG = "config.toml"
SESSION = ("id", "started_at", "command", "commit", "versions", "host", "config_hash", "cuda_graphs")
"""what provenance keeps of each earlier session, when a run that was stopped, or finished, goes on"""
ASIDE = ".damaged-"
"""in the name of a folder that was set aside: no part of the artifact, to be removed by whoever looked at it"""
WANDB = "wandb"
"""folder of W&B's own logs and links, in the output of a run that it is told of: no part of the artifact"""
CARRIED = ("damaged_checkpoints",)
"""what stays in the provenance of a run that goes on"""
HASH_CONTENT_UP_TO_BYTES = 1 << 20
HASHED_END_BYTES = 1 << 16
WAY_OUT = "choose another output (output=...) or remove the folder"
CHECKPOINT = "checkpoint"
"""the kind whose every file has a checksum"""
KIND_IN_WORDS = {CHECKPOINT: "a checkpoint", "hf": "a Hugging Face folder"}
"""of kinds that are no stage's name"""
CHANGED = "the artifact was changed; remove the folder and run its stage again"


def begin(folder: Path, kind: str, config: BaseModel, parents: Sequence[Path] = ()) -> Path:
    """Make `folder` and record what is about to be made in it.

    kind: the stage's name, checked when the folder is read back. parents: the finished artifacts it is made from.
    A folder that was begun and has no COMPLETE is taken up again (its stage decides what it can reuse; `begun_as` tells what it was for); one that
    is COMPLETE is opened again only by the same config and parents. Errors: UserError for an unfinished parent, another kind's folder, another run's
    finished folder, a folder with files that no stage began, and a config that holds a secret (it would be written here).
    """
    text = to_toml(config)
    secrets.refuse(tomllib.loads(text))
    provenance = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "id": uuid.uuid4().hex,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "config_hash": config_hash(config),
        "parents": {str(parent): digest(parent) for parent in parents},
        "command": [secrets.mask(word) for word in sys.argv],
        "commit": git_commit(),
        "versions": {"megatron-prism": __version__, "python": platform.python_version(), **package_versions()},
        "host": host_shape(),
    }
    _check_free(folder, kind, config, parents)
    folder.mkdir(parents=True, exist_ok=True)
    if _has(folder, PROVENANCE):  # finished or not: what made it so far is told
        before = _read_json(folder / PROVENANCE)
        session = {key: before[key] for key in SESSION if key in before}
        provenance |= {key: before[key] for key in CARRIED if key in before}
        provenance["earlier_sessions"] = [*before.get("earlier_sessions", []), session]
    if is_complete(folder):
        (folder / COMPLETE).unlink()
        sync_folder(folder)  # the mark is gone for good before anything else changes
    write_atomic(folder / PROVENANCE, json.dumps(provenance, indent=2) + "\n")
    write_atomic(folder / CONFIG, text)
    return folder


def _check_free(folder: Path, kind: str, config: BaseModel, parents: Sequence[Path]) -> None:
    there = checksums.is_folder(folder)
    if not there and folder.exists():
        raise UserError(f"{folder} is a file; an output is a folder: choose another output (output=...)")
    if not there or not any(path.suffix != ".tmp" for path in folder.iterdir()):
        return
    if not _has(folder, PROVENANCE):
        raise UserError(f"{folder} is not empty and was not made by a stage (no {PROVENANCE} in it); {WAY_OUT}")
    found = _read_json(folder / PROVENANCE)["kind"]
    if found != kind:
        raise UserError(f"{folder} is {_in_words(found)}, so {_in_words(kind)} cannot be written there; {WAY_OUT}")
    changed = changes(folder, config, parents) if is_complete(folder) else []
    if changed:
        raise UserError(f"{folder} is a finished {kind} of another request ({_few(changed)}); {WAY_OUT}")


def provenance(folder: Path) -> dict[str, Any]:
    """What a folder's provenance says, finished or not."""
    return _read_json(folder / PROVENANCE)


def changed_versions(folder: Path) -> list[str]:
    """Packages, and Python, whose version is another than when this artifact was begun or gone on with before; "NAME OLD -> NEW", in order."""
    now = provenance(folder)
    earlier = now.get("earlier_sessions", [])
    if not earlier:
        return []
    old, new = earlier[-1].get("versions", {}), now["versions"]
    return [f"{name} {old.get(name, 'none')} -> {new.get(name, 'none')}" for name in sorted(old | new) if old.get(name) != new.get(name)]


def annotate(folder: Path, **facts: Any) -> None:
    """Add facts to the provenance of an artifact that is being made."""
    assert not is_complete(folder), f"{folder} is finished"
    write_atomic(folder / PROVENANCE, json.dumps({**_read_json(folder / PROVENANCE), **facts}, indent=2) + "\n")


def complete(folder: Path) -> str:
    """Write COMPLETE: the size of every file, and the folder's digest (returned), a sha256 that children record as their parent's hash.

    Small files (up to 1 MiB) enter the digest by content, larger ones by size, beginning and end (a checkpoint or a pool of shards is too large to
    read again; shards have checksums of their own). provenance.json, with its unique id, is always among them, so no two makings have one digest.
    """
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in _files(folder)}
    assert PROVENANCE in sizes and CONFIG in sizes, f"complete() without begin() in {folder}"
    record: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "digest": _digest_of_files(folder, sizes),
        "files": sizes,
    }
    if _read_json(folder / PROVENANCE)["kind"] == CHECKPOINT:
        record["checksums"] = checksums.to_record(checksums.of_unlisted(folder, list(sizes)))
    write_atomic(folder / COMPLETE, json.dumps(record, indent=1) + "\n")
    return str(record["digest"])


def require(folder: Path, kind: str | None = None, accepted: str | None = None) -> dict[str, Any]:
    """The provenance of a finished artifact, after checking that every file it recorded is there in its size.

    accepted: what else may be given in its place, in words: "a checkpoint, a training run or a Hugging Face folder".

    Errors: UserError naming the folder when it is missing, unfinished, of another kind, of a newer schema, or was changed.
    """
    if not checksums.is_folder(folder):
        raise UserError(f"{folder} does not exist; run the stage that makes it")
    if not is_complete(folder):
        raise UserError(
            f"{folder} has no {COMPLETE} mark: it is half-written or its stage is still running; "
            "run that stage again with the same output (it continues where it can), or remove the folder"
        )
    record, provenance = _read_json(folder / COMPLETE), _read_json(folder / PROVENANCE)
    for part in (record, provenance):
        if part.get("schema_version", 0) > SCHEMA_VERSION:
            raise UserError(
                f"{folder} has artifact schema {part['schema_version']}, this version reads up to {SCHEMA_VERSION}; upgrade megatron-prism"
            )
    if kind is not None and provenance["kind"] != kind:
        raise UserError(f"{folder} is {_in_words(provenance['kind'])}, but {accepted or _in_words(kind)} is needed here")
    for name, size in record["files"].items():
        found = checksums.size_of(inside(folder, name, COMPLETE))
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise UserError(f"{folder / name} {state}, {COMPLETE} says {size} bytes: {CHANGED}")
    return provenance


def inside(folder: Path, name: str, named_by: str, links: bool = False) -> Path:
    """`folder / name`, where `named_by`, a list of files such as a manifest, names it. Errors: UserError for a name that leaves the folder.

    What a list names is read as data of its folder, so it may not lead elsewhere: by an absolute path, by "..", or through a symbolic link.
    links: those are allowed (a Hugging Face cache keeps every file behind one).
    """
    root = checksums.real_path(folder)
    reached = [os.path.normpath(os.path.join(root, name))]  # noqa: PTH118 (the lexical place: Path.resolve follows links before "..")
    if not links:
        reached.append(checksums.real_path(folder / name))
    if not name or any(os.path.commonpath([place, root]) != root for place in reached):
        raise UserError(
            f"{folder / named_by} names {name!r}, which leads out of {folder}: it can list files of its own folder alone; "
            "make it again, or put them there"
        )
    return folder / name


def expected_checksums(folder: Path) -> tuple[dict[str, Checksum] | None, list[str]]:
    """What a finished artifact's files were when it was made, and what is wrong with the tables that say so. None: no checksums (others, old)."""
    record = _read_json(folder / COMPLETE)
    expected, wrong = checksums.expected(folder, record, COMPLETE)
    for name in [*record["files"], *(expected or {})]:
        inside(folder, name, COMPLETE)
    return expected, wrong


def verify(folder: Path) -> None:
    """`require`, and the content of the files: of a checkpoint every byte; of others every byte of small files, and the ends of large ones.

    Errors: UserError.
    """
    require(folder)
    record = _read_json(folder / COMPLETE)
    expected, wrong = expected_checksums(folder)
    wrong += checksums.damages(folder, expected or {})
    if wrong:
        raise UserError(f"{_few(wrong)}: {CHANGED}")
    if _digest_of_files(folder, record["files"]) != record["digest"]:
        raise UserError(f"{folder}: the content of its files is not what {COMPLETE} recorded: {CHANGED}")


def is_complete(folder: Path) -> bool:
    """Whether the folder carries its COMPLETE mark. Errors: NOT_KNOWN where the file system does not say."""
    return _has(folder, COMPLETE)


def digest(folder: Path) -> str:
    """The digest of a finished artifact. Errors: UserError as for `require`."""
    require(folder)
    return str(_read_json(folder / COMPLETE)["digest"])


def begun_as(folder: Path) -> str | None:
    """The `config_hash` that the folder was begun with, finished or not; None for a folder that no stage began.

    A stage that can continue half-made work asks before `begin`, and reuses only what the same config made.
    """
    return str(_read_json(folder / PROVENANCE)["config_hash"]) if _has(folder, PROVENANCE) else None


def is_current(folder: Path, config: BaseModel, parents: Sequence[Path] = ()) -> bool:
    """Whether `folder` is finished and was made from this very config and these very parents. Errors: UserError if its files were changed."""
    if not is_complete(folder):
        return False
    require(folder)
    return not changes(folder, config, parents)


def left_as_it_is(folder: Path) -> Path:
    """Say, once for all ranks, that a stage has nothing to do for an output that is current; returns it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{folder} is finished and unchanged: nothing to do")
    return folder


def changes(folder: Path, config: BaseModel, parents: Sequence[Path] = ()) -> list[str]:
    """Why a finished folder is not what this config and these parents would make, one text a reason; empty when it is.

    Parents count by digest, not by path: a project that was moved as a whole is still current.
    """
    provenance = _read_json(folder / PROVENANCE)
    found: list[str] = []
    if provenance["config_hash"] != config_hash(config):
        found = _config_changes(folder / CONFIG, config)
    return found + _parent_changes(provenance["parents"], parents)


def _parent_changes(recorded: dict[str, str], parents: Sequence[Path]) -> list[str]:
    """How the inputs of a finished folder, path -> digest as it recorded them, differ from those of today."""
    found = [f"its input {parent} is not finished" for parent in parents if not is_complete(parent)]
    now = {parent: digest(parent) for parent in parents if is_complete(parent)}
    if not found and list(now.values()) == list(recorded.values()):
        return []
    paths = {Path(path).resolve() for path in recorded}
    for parent, name in now.items():
        if name not in recorded.values():
            found.append(f"its input {parent} was made again since" if parent.resolve() in paths else f"{parent} is a new input")
    here = {parent.resolve() for parent in parents}
    found += [f"{path} is no longer an input" for path, name in recorded.items() if name not in now.values() and Path(path).resolve() not in here]
    return found or ["its inputs are in another order"]


def _config_changes(path: Path, config: BaseModel) -> list[str]:
    """How a stored config differs from another as today's schema reads both: a key that it lacks has its default, so new keys change nothing."""
    stored = _read_toml(path)
    try:
        before = resolved(stored, type(config), where=str(path))
    except UserError:  # keys that left the schema, or values that it allows no more
        return differences(stored, tomllib.loads(to_toml(config))) or ["its config"]
    if config_hash(before) == config_hash(config):
        return []
    return differences(json.loads(before.model_dump_json()), json.loads(config.model_dump_json())) or ["its config"]


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_of(path)
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def temporary_of(path: Path) -> Path:
    """A new name for a file until it is whole: beside it, no part of an artifact, and met by no other process, on whichever machine."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    """Every file of the artifact but its mark, temporary, set-aside and wandb's ones. A link could change behind our back: artifacts hold none."""
    found = sorted(path for path in folder.rglob("*") if path.relative_to(folder) != Path(COMPLETE) and not path.name.endswith(".tmp"))
    found = [path for path in found if path.relative_to(folder).parts[0] != WANDB]
    found = [path for path in found if ASIDE not in str(path.relative_to(folder))]
    links = [path for path in found if path.is_symlink()]
    assert not links, f"an artifact holds its own files, no symbolic links: {links[:3]}"
    return [path for path in found if path.is_file()]


def _digest_of_files(folder: Path, sizes: dict[str, int]) -> str:
    hasher = hashlib.sha256()
    for name, size in sizes.items():
        hasher.update(f"{name}\0{size}\0".encode())
        with (folder / name).open("rb") as file:
            if size <= HASH_CONTENT_UP_TO_BYTES:
                hasher.update(file.read())
                continue
            hasher.update(file.read(HASHED_END_BYTES))
            file.seek(-HASHED_END_BYTES, os.SEEK_END)
            hasher.update(file.read(HASHED_END_BYTES))
    return hasher.hexdigest()


def _in_words(kind: str) -> str:
    return KIND_IN_WORDS.get(kind, f"an output of prism {kind}")


def _few(texts: list[str], shown: int = 4) -> str:
    return "; ".join(texts[:shown]) + (f"; and {len(texts) - shown} more" if len(texts) > shown else "")


def _has(folder: Path, name: str) -> bool:
    return checksums.size_of(folder / name) is not None


def _read_json(path: Path) -> dict[str, Any]:
    content = _content(path)
    try:
        return dict(json.loads(content))
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}): {CHANGED}") from None


def _read_toml(path: Path) -> dict[str, Any]:
    content = _content(path)
    try:
        return tomllib.loads(content.decode())
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}): {CHANGED}") from None


def _content(path: Path) -> bytes:
    """Errors: NOT_KNOWN where the file system refuses it, which no advice to remove a folder may follow; UserError where it is not there."""
    try:
        return checksums.reading(path, path.read_bytes)
    except checksums.MISSING as error:
        raise UserError(f"{path} cannot be read ({error}): {CHANGED}") from None
