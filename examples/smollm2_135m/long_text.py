"""Long documents that every machine with Python has: source files of one package, one after the other, in the order of their paths.

packages            the installed packages: to train on
standard_library    Python's own modules: held out, by other authors, and in none of the packages but for a few copied files
Real text with real distances (a name is used far from where it was defined), and no prose. The model has certainly read much of it before.
"""

import sys
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import chain, zip_longest
from pathlib import Path

LARGEST_FILE = 400_000
"""characters; longer files are tables"""
NOT_PROGRAMS = {"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__", "node_modules"}


def packages(characters: int, per_package: int, total: int) -> Iterator[str]:
    """Documents of at least `characters` from each package's first `per_package` characters, a document of each in turn, `total` in all.

    A package's last document may be shorter: `prism prep` drops it by its length.
    """
    places = [Path(place) for place in sys.path if Path(place).name in {"site-packages", "dist-packages"} and Path(place).is_dir()]
    folders = {folder.name: folder for place in reversed(places) for folder in place.iterdir() if folder.is_dir()}
    chosen = [folder for _, folder in sorted(folders.items())]
    sources = [up_to(per_package, joined(source_files(folder), folder.parent, characters)) for folder in chosen]
    in_turn = (text for row in zip_longest(*sources) for text in row if text is not None)
    yield from up_to(total, in_turn)


def standard_library(characters: int, total: int) -> Iterator[str]:
    """Documents of at least `characters` of the standard library, without its tests and tables, `total` in all."""
    root = Path(sysconfig.get_paths()["stdlib"])
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir() and folder.name not in NOT_PROGRAMS)
    files = chain(sorted(root.glob("*.py")), *(source_files(folder) for folder in folders))
    yield from up_to(total, joined(files, root, characters))


def up_to(characters: int, texts: Iterable[str]) -> Iterator[str]:
    """The first texts, until they have so many characters."""
    size = 0
    for text in texts:
        yield text
        size += len(text)
        if size >= characters:
            return


def source_files(folder: Path) -> list[Path]:
    """Python files below a folder, in the order of their paths."""
    return sorted(path for path in folder.rglob("*.py") if not NOT_PROGRAMS & set(path.relative_to(folder).parts))


def joined(files: Iterable[Path], root: Path, characters: int) -> Iterator[str]:
    """Files, each below a comment with its path, joined until a document has `characters`."""
    parts: list[str] = []
    size = 0
    for path in files:
        text = path.read_text(encoding="utf-8", errors="replace")
        if not text.strip() or len(text) > LARGEST_FILE:
            continue
        parts.append(f"# {path.relative_to(root)}\n{text}")
        size += len(parts[-1])
        if size >= characters:
            yield "\n".join(parts)
            parts, size = [], 0
    if parts:
        yield "\n".join(parts)
