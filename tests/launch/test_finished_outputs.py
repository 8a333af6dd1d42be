"""Nothing of a finished output is removed, unless it was out of date at the start and the user asked: whatever the file system says meanwhile."""

import errno
import importlib
import os
import shutil
from pathlib import Path

import pytest

from megatron_prism import artifact, checksums
from megatron_prism.config import Block
from megatron_prism.errors import MachineError, UnreadableError, UserError
from megatron_prism.launch import pipeline

CHAIN = """
output = "{runs}"
[[stage]]
name = "first"
stage = "{own}"
[[stage]]
name = "second"
stage = "{own}"
set = {{ source = "stage:first" }}
"""


class Chain:
    """Two finished stages, of which the second holds what took a month."""

    def __init__(self, folder: Path, own: str, module: object) -> None:
        self.path, self.runs = folder / "pipeline.toml", folder / "runs"
        self.path.write_text(CHAIN.format(runs=self.runs, own=own))
        for name, source in (("first", None), ("second", self.runs / "first")):
            config = module.Config(output=self.runs / name, source=source)  # type: ignore[attr-defined]
            artifact.begin(self.runs / name, own, config, [source] if source else [])
            (self.runs / name / "weights").write_text("a month")
            artifact.complete(self.runs / name)
        self.before = self.files()

    def files(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted(self.runs.glob("*/*"))}


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chain:
    package = tmp_path / f"stages_of_{tmp_path.name}"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(Path(__file__).parent / "own_stage.py", package)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(checksums, "RETRY_SECONDS", 0.0)
    own = f"{package.name}.own_stage"
    return Chain(tmp_path, own, importlib.import_module(own))


class Once:
    """One look at a file, and the second try of it, meet an error; after: how many looks are answered before it."""

    def __init__(self, name: str, method: str, after: int, monkeypatch: pytest.MonkeyPatch, number: int = errno.ESTALE) -> None:
        self.looks, right = 0, getattr(Path, method)

        def flaky(path: Path, *words: object, **more: object) -> object:
            if path.parent.name == "second" and path.name == name:
                self.looks += 1
                if after < self.looks <= after + 2:
                    raise OSError(number, os.strerror(number))
            return right(path, *words, **more)

        monkeypatch.setattr(Path, method, flaky)


LOOKS = [(name, "stat", after) for name in ("weights", "COMPLETE", "provenance.json", "config.toml") for after in (0, 1)]
LOOKS += [("provenance.json", "read_bytes", after) for after in range(4)]


@pytest.mark.parametrize("remake", [False, True])
@pytest.mark.parametrize(("name", "method", "after"), LOOKS)
def test_a_passing_error_ends_the_command_as_the_machines_and_removes_nothing(
    chain: Chain, monkeypatch: pytest.MonkeyPatch, name: str, method: str, after: int, remake: bool
) -> None:
    with monkeypatch.context() as patched:
        met = Once(name, method, after, patched)
        with pytest.raises(MachineError, match=f"{name} could not be read.*ESTALE"):
            pipeline.run_pipeline(chain.path, remake=remake)
    assert met.looks == after + 2 and chain.files() == chain.before
    pipeline.run_pipeline(chain.path)
    assert chain.files() == chain.before


@pytest.mark.parametrize("after", [0, 1])
def test_nor_does_leave_that_was_taken_away(chain: Chain, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    with monkeypatch.context() as patched:
        Once("weights", "stat", after, patched, errno.EACCES)
        with pytest.raises(UnreadableError, match=r"weights could not be read: Permission denied \(EACCES\)"):
            pipeline.run_pipeline(chain.path, remake=True)
    assert chain.files() == chain.before


def test_a_config_that_cannot_be_read_is_no_changed_config(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked at where hashes differ: a key that is new since then."""

    class Other(Block):
        seed: int = 2

    with monkeypatch.context() as patched:
        met = Once("config.toml", "open", 0, patched)
        with pytest.raises(MachineError, match=r"config\.toml could not be read"):
            artifact.changes(chain.runs / "second", Other())
        before = met.looks
        assert artifact.changes(chain.runs / "second", Other())
    assert met.looks == before + 1, "it is read once: what is then found wrong in it is no matter of the disk"


@pytest.mark.parametrize("remake", [False, True])
def test_what_comes_out_of_date_while_others_run_is_refused(chain: Chain, monkeypatch: pytest.MonkeyPatch, remake: bool) -> None:
    """Between the check at the start and the stage's turn lie hours, in which somebody may cut a file short."""
    right = pipeline.Record.write

    def meanwhile(record: pipeline.Record, *words: object, **facts: object) -> None:
        (chain.runs / "second" / "weights").write_text("a")
        right(record, *words, **facts)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline.Record, "write", meanwhile)
    with pytest.raises(UserError, match=r"stage second: .* has come out of date since this command began: .*weights has 1 bytes"):
        pipeline.run_pipeline(chain.path, remake=remake)
    assert chain.files().keys() == chain.before.keys()
