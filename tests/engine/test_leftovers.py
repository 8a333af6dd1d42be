"""Half-written step folders are removed at a start, by who has the folder for itself, and nothing else is."""

import json
import logging
import os
from pathlib import Path

import pytest

from megatron_prism import artifact
from megatron_prism.config import Block
from megatron_prism.engine import leftovers, run_folder, run_lock


class Nothing(Block):
    """A config without keys."""


def write_step(run: Path, step: int, complete: bool = True) -> Path:
    folder = run_folder.step_folder(run, step)
    artifact.begin(folder, "checkpoint", Nothing())
    (folder / "sharded").mkdir()
    (folder / "sharded" / "__0_0.distcp").write_bytes(bytes(5 * 2**20))
    if complete:
        artifact.complete(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """As kills left it: steps 2 and 4 are whole; of 3 a save was cut short, of 1 a deletion; 5 was set aside; 6 lies elsewhere, behind a link."""
    run = artifact.begin(tmp_path / "run", "train", Nothing())
    for step in (2, 4):
        write_step(run, step)
    write_step(run, 3, complete=False)
    run_folder.step_folder(run, 1).mkdir()
    aside = write_step(run, 5, complete=False)
    aside.rename(aside.with_name(f"{aside.name}{artifact.ASIDE}1"))
    linked = write_step(tmp_path / "elsewhere", 6, complete=False)
    run_folder.step_folder(run, 6).symlink_to(linked)
    return run


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests write is a second old; a test says where that is too young."""
    monkeypatch.setattr(leftovers, "STILL_SECONDS", 0.0)


def names(run: Path) -> list[str]:
    return sorted(path.name.removeprefix("step_0000000") for path in (run / "checkpoints").iterdir())


ALL = ["1", "2", "3", "4", "5.damaged-1", "6"]


def test_under_the_lock_what_is_half_written_goes_and_is_said_once(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = {path: path.read_bytes() for step in (2, 4) for path in run_folder.step_folder(run, step).rglob("*") if path.is_file()}
    with run_lock.held(run):
        assert leftovers.remove(run, "train") == [run_folder.step_folder(run, step) for step in (1, 3)]
        assert leftovers.remove(run, "train") == []
    assert names(run) == ["2", "4", "5.damaged-1", "6"]
    (said,) = (line.message for line in caplog.records if line.levelno == logging.WARNING)
    assert said.startswith(f"2 checkpoints, 0.00 GiB ({run_folder.step_folder(run, 1)}, ") and said.endswith(": removed")
    assert {path: path.read_bytes() for step in (2, 4) for path in run_folder.step_folder(run, step).rglob("*") if path.is_file()} == before
    assert (run.parent / "elsewhere" / "checkpoints" / "step_00000006" / "sharded").is_dir()


def test_without_the_lock_nothing_goes(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert leftovers.remove(run, "train") == [] and names(run) == ALL
    assert "left as it is" in caplog.text


def test_nothing_goes_in_a_finished_run_or_another_stages_folder(run: Path) -> None:
    with run_lock.held(run):
        assert leftovers.remove(run, "rl") == []
        (run / "checkpoints" / "step_00000006").unlink()  # an artifact holds no links
        artifact.complete(run)
        assert leftovers.remove(run, "train") == []
    assert names(run) == [name for name in ALL if name != "6"]
    artifact.require(run, "train")


def test_a_mark_that_is_remembered_as_missing_is_asked_for_anew(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client of a network's file system that looked a minute ago says that COMPLETE is not there, until it changes the folder itself."""
    newest, right = run_folder.step_folder(run, 4), artifact.checksums.size_of

    def remembered(path: Path) -> int | None:
        return None if path == newest / artifact.COMPLETE else right(path)

    monkeypatch.setattr(artifact.checksums, "size_of", remembered)
    with run_lock.held(run):
        leftovers.remove(run, "train")
    assert newest.is_dir() and json.loads((newest / artifact.COMPLETE).read_text()) and not (newest / leftovers.MARK).exists()


def test_what_changed_a_moment_ago_stays_until_it_is_still(run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A save on another machine, where each has locks of its own; or a checkpoint that is copied back, with its times, and COMPLETE at the end."""
    young, empty = run_folder.step_folder(run, 3), run_folder.step_folder(run, 1)
    monkeypatch.setattr(leftovers, "STILL_SECONDS", 300.0)
    for path in young.rglob("*"):
        os.utime(path, (0, 0))  # as cp -p leaves it
    with run_lock.held(run):
        assert leftovers.remove(run, "train") == [empty], "nothing is lost with it"
        assert "something in it changed within 300 s" in caplog.text and young.is_dir()
        assert leftovers.remove_later(run) == [] and young.is_dir()
        monkeypatch.setattr(leftovers, "STILL_SECONDS", 0.0)
        assert leftovers.remove_later(run) == [young] and leftovers.remove_later(run) == []
    assert names(run) == ["2", "4", "5.damaged-1", "6"]


def test_what_was_completed_elsewhere_meanwhile_stays(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "STILL_SECONDS", 300.0)
    with run_lock.held(run):
        leftovers.remove(run, "train")
        artifact.complete(run_folder.step_folder(run, 3))
        monkeypatch.setattr(leftovers, "STILL_SECONDS", -1e9)  # however young
        assert leftovers.remove_later(run) == []
    artifact.verify(run_folder.step_folder(run, 3))
