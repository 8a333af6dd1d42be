"""The artifacts behind a report: those that were named, and what they were made from, as far back as provenance tells.

Owns: finding artifacts under a folder, following parents (by digest first, so that a moved project is still one; then by path), and each artifact's
state: finished, unfinished (with its progress), unreadable (and why), or missing. A checkpoint of a run stands for the run. Refuses: a path that
holds no artifact. What is broken is a state here, never an error.
"""

import json
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from megatron_prism import artifact
from megatron_prism.errors import UserError

State = Literal["finished", "unfinished", "unreadable", "missing"]
Table = dict[str, Any]
KIND = "report"
DEPTH = 4
"""folders below a named one in which artifacts are looked for"""
CHECKPOINTS = "checkpoints"
STEP = "step_????????"
"""a checkpoint's folder; one that was set aside because it is damaged has a longer name, and is no part of its run"""
UNRECORDED = {"prep": ("tokenizer",)}
"""keys of a config that name an artifact which provenance has no digest of"""
RUN_KINDS = ("train", "extend", "rl")


@dataclass(frozen=True)
class Link:
    """An artifact's parent. path: as it was recorded; artifact: where it stands in the collection; step: of a run's checkpoint; note: what is odd."""

    path: str
    digest: str
    artifact: "Artifact"
    step: int | None = None
    note: str = ""


@dataclass
class Artifact:
    """An output folder, whatever its state. problem: why it is unreadable."""

    folder: Path
    state: State
    name: str = ""
    problem: str = ""
    provenance: Table = field(default_factory=dict)
    config: Table = field(default_factory=dict)
    record: Table = field(default_factory=dict)
    """its COMPLETE"""
    parents: list[Link] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """What it is, as its stage wrote: train, prep, evaluate, checkpoint, ..."""
        return str(self.provenance.get("kind", ""))

    @property
    def stage(self) -> str:
        """The stage that made it: a checkpoint or a Hugging Face folder is merged or converted."""
        if self.kind in ("checkpoint", "hf"):
            return "merge" if "merged" in self.provenance else "convert"
        return self.kind

    @property
    def digest(self) -> str:
        """What its children record; empty while it is unfinished."""
        return str(self.record.get("digest", ""))

    @property
    def sessions(self) -> int:
        """How often it was started: one more than it was stopped."""
        return 1 + len(self.provenance.get("earlier_sessions", []))

    @property
    def seconds(self) -> float | None:
        """What its last session took; None where its end is not known."""
        begun, ended = self.provenance.get("started_at"), self.record.get("finished_at")
        return (datetime.fromisoformat(ended) - datetime.fromisoformat(begun)).total_seconds() if begun and ended else None

    @property
    def is_shown(self) -> bool:
        """Whether its files are drawn: it is whole, or a run that is still going on, whose log grows by whole lines."""
        return self.state == "finished" or (self.state == "unfinished" and self.kind in RUN_KINDS)

    def read_json(self, name: str) -> Table:
        """One of its files."""
        return dict(json.loads((self.folder / name).read_text(encoding="utf-8")))

    def lines(self) -> list[Table]:
        """The lines of its metrics.jsonl; a last one that is still being written is left out."""
        path = self.folder / "metrics.jsonl"
        whole = path.read_text(encoding="utf-8").rpartition("\n")[0] if path.is_file() else ""
        return [json.loads(line) for line in whole.splitlines()]


def gather(paths: Sequence[Path]) -> list[Artifact]:
    """All artifacts under the paths, and what they were made from; parents stand before children. Errors: UserError for a path without any."""
    found = _Collection()
    for path in paths:
        for folder in _named(path):
            found.add(folder)
    found.follow()
    return found.ordered()


def under(path: Path) -> list[Path]:
    """The artifacts' folders that a path stands for, sorted; none where there are none. A page of ours is no part of its own report."""
    if _is_artifact(path):
        return [path]
    return [folder for folder in _scan(path, DEPTH) if _kind_of(folder) != KIND] if path.is_dir() else []


def _named(path: Path) -> list[Path]:
    if not path.exists():
        raise UserError(f"{path} does not exist; name outputs of stages, or the folder that a pipeline wrote them to")
    folders = under(path)
    if not folders:
        what = "is a file" if path.is_file() else f"holds no artifact: there is no {artifact.PROVENANCE} in it, nor up to {DEPTH} folders below"
        raise UserError(f"{path} {what}; a report is made of outputs of stages: name one, or the folder that a pipeline wrote them to")
    return folders


def _scan(folder: Path, depth: int) -> Iterator[Path]:
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if _is_artifact(inner):
            yield inner
        elif depth > 1:
            yield from _scan(inner, depth - 1)


def _is_artifact(folder: Path) -> bool:
    return (folder / artifact.PROVENANCE).is_file() or (folder / artifact.COMPLETE).is_file()


def _kind_of(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / artifact.PROVENANCE).read_text(encoding="utf-8"))["kind"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


class _Collection:
    """Artifacts by their place, and where each digest is."""

    def __init__(self) -> None:
        self.by_folder: dict[Path, Artifact] = {}
        self.by_digest: dict[str, tuple[Artifact, int | None]] = {}
        self._queue: list[Artifact] = []

    def add(self, folder: Path) -> Artifact:
        """The artifact that a folder is, or lies in as one of its checkpoints."""
        folder = _outermost(folder.resolve())
        if folder not in self.by_folder:
            found = self.by_folder[folder] = read(folder)
            self._queue.append(found)
            for digest, step in _digests(found):
                self.by_digest.setdefault(digest, (found, step))
        return self.by_folder[folder]

    def follow(self) -> None:
        """Take in the parents of all, and theirs."""
        while self._queue:
            child = self._queue.pop(0)
            recorded = child.provenance.get("parents")
            for path, digest in (recorded if isinstance(recorded, dict) else {}).items():
                child.parents.append(self._link(child, str(path), str(digest)))
            for path in _unrecorded(child):
                place = next((place for place in _places(child, path) if _lies_in_artifact(place)), None)
                found = self.add(_nearest(place)) if place is not None else child
                if found is not child and all(link.artifact is not found for link in child.parents):
                    child.parents.append(Link(path, "", found))

    def _link(self, child: Artifact, path: str, digest: str) -> Link:
        if digest not in self.by_digest:
            for place in _places(child, path):
                if _lies_in_artifact(place):
                    self.add(_nearest(place))
                    break
        if digest in self.by_digest:
            found, step = self.by_digest[digest]
            return Link(path, digest, found, step)
        for place in _places(child, path):
            if _lies_in_artifact(place):
                found = self.add(_nearest(place))
                note = "made again since" if place.exists() else "this checkpoint was removed"
                return Link(path, digest, found, _step_of(place), note if found.state == "finished" else "")
        gone = Path(path).absolute()
        missing = self.by_folder.setdefault(gone, Artifact(gone, "missing", problem=f"{path} is not on this machine"))
        return Link(path, digest, missing, _step_of(gone))

    def ordered(self) -> list[Artifact]:
        """Parents first; else in the order in which they were begun. Names that several have carry their folders."""
        every = sorted(self.by_folder.values(), key=lambda one: (one.provenance.get("started_at", ""), str(one.folder)))
        _name(every)
        placed: dict[Path, Artifact] = {}

        def place(one: Artifact, open_: frozenset[Path]) -> None:
            if one.folder in placed or one.folder in open_:
                return
            for link in one.parents:
                place(link.artifact, open_ | {one.folder})
            placed[one.folder] = one

        for one in every:
            place(one, frozenset())
        return list(placed.values())


def read(folder: Path) -> Artifact:
    """One artifact with its state."""
    found = Artifact(folder, "unreadable")
    try:
        found.provenance = _read(folder / artifact.PROVENANCE, json.loads)
        found.config = _read(folder / artifact.CONFIG, tomllib.loads)
        if artifact.is_complete(folder):
            artifact.require(folder)
            found.record = _read(folder / artifact.COMPLETE, json.loads)
        found.state = "finished" if found.record else "unfinished"
        _ = found.kind, found.seconds  # a time that is none is a fault of the file
    except (UserError, ValueError, TypeError, KeyError) as error:
        found.state, found.problem = "unreadable", str(error)
    return found


def _read(path: Path, parse: Callable[[str], Any]) -> Table:
    try:
        return dict(parse(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def progress(one: Artifact) -> tuple[int, int] | None:
    """Of a run: the last step in its log, and how many there will be."""
    steps = one.config.get("steps")
    if one.kind not in RUN_KINDS or not isinstance(steps, int):
        return None
    lines = one.lines()
    return (int(lines[-1]["step"]) if lines else 0), steps


def _outermost(folder: Path) -> Path:
    """The run that a checkpoint lies in; the folder itself otherwise."""
    inside = [above for above in folder.parents if _is_artifact(above)]
    return inside[-1] if inside else folder


def _nearest(place: Path) -> Path:
    return next(folder for folder in (place, *place.parents) if _is_artifact(folder))


def _lies_in_artifact(place: Path) -> bool:
    return any(_is_artifact(folder) for folder in (place, *place.parents))


def _places(child: Artifact, path: str) -> list[Path]:
    """Where a recorded path may lie: from the folder that the child's command ran in, as its output tells, and from here."""
    places = [Path(path).absolute()]
    output = Path(str(child.config.get("output", "")))
    if output.parts and not output.is_absolute() and child.folder.parts[-len(output.parts) :] == output.parts:
        places.insert(0, Path(*child.folder.parts[: -len(output.parts)]) / path)
    return places


def _unrecorded(child: Artifact) -> Iterator[str]:
    """Paths in its config that provenance has no digest of and that may lie in an artifact: models that were read as a run exported them, too."""
    recorded = child.provenance.get("parents") or {}
    for key in UNRECORDED.get(child.kind, ()):
        if child.config.get(key):
            yield str(child.config[key])
    models = child.config.get("models")
    for model in models if isinstance(models, list) else []:
        if isinstance(model, dict) and "path" in model and model["path"] not in recorded:
            yield str(model["path"])


def _digests(one: Artifact) -> Iterator[tuple[str, int | None]]:
    """Of the artifact, and of its checkpoints."""
    if one.digest:
        yield one.digest, None
    for mark in sorted(one.folder.glob(f"{CHECKPOINTS}/{STEP}/{artifact.COMPLETE}")):
        try:
            yield str(json.loads(mark.read_text(encoding="utf-8"))["digest"]), _step_of(mark.parent)
        except (OSError, ValueError, KeyError, TypeError):
            continue


def _step_of(folder: Path) -> int | None:
    number = folder.name.removeprefix("step_")
    return int(number) if folder.name.startswith("step_") and number.isdecimal() else None


def _name(every: Sequence[Artifact]) -> None:
    """Each artifact by the fewest last folders of its path that tell it from the others."""
    for one in every:
        others = [other.folder.parts for other in every if other is not one]
        count = next(
            (count for count in range(1, len(one.folder.parts)) if all(parts[-count:] != one.folder.parts[-count:] for parts in others)),
            len(one.folder.parts),
        )
        one.name = "/".join(one.folder.parts[-count:])
