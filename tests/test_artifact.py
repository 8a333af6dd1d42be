"""Law 9: nothing half-written is ever read. And: a finished folder says what it is, what it was made from, and whether it still is that."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prism import artifact, surroundings
from megatron_prism.config import Block
from megatron_prism.errors import UserError

FIXTURES = Path(__file__).parent / "fixtures"


class Config(Block):
    """What these tests make."""

    output: Path = Path("runs/prep")
    seed: int = 7


def _make(folder: Path, config: Config | None = None, parents: tuple[Path, ...] = (), content: str = "content") -> Path:
    artifact.begin(folder, "prep", config or Config(), parents)
    (folder / "inner").mkdir(exist_ok=True)
    (folder / "inner/data.txt").write_text(content)
    artifact.complete(folder)
    return folder


def test_a_finished_folder_tells_its_config_and_where_it_came_from(tmp_path: Path) -> None:
    parent = _make(tmp_path / "parent")
    child = _make(tmp_path / "child", Config(seed=3), (parent,))
    assert (child / "config.toml").read_text() == 'output = "runs/prep"\nseed = 3\n'
    provenance = artifact.require(child, "prep")
    assert provenance["schema_version"] == artifact.SCHEMA_VERSION
    assert provenance["parents"] == {str(parent): artifact.digest(parent)}
    assert provenance["command"] == sys.argv
    assert provenance["versions"]["python"] == ".".join(map(str, sys.version_info[:3])) and "torch" in provenance["versions"]
    assert provenance["host"]["cpus"] == os.cpu_count() and provenance["host"]["memory_gib"] > 0


def test_the_commit_is_that_of_our_own_source_tree() -> None:
    root = Path(artifact.__file__).resolve().parents[1]
    head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    assert (surroundings.git_commit() or "").removesuffix("+changes") == head


@pytest.mark.parametrize("missing", ["COMPLETE", "inner/data.txt", "provenance.json"])
def test_a_folder_that_lacks_a_file_is_refused_by_name(tmp_path: Path, missing: str) -> None:
    folder = _make(tmp_path / "made")
    (folder / missing).unlink()
    with pytest.raises(UserError, match=f"(?s){folder}.*(run that stage again|run its stage again)"):
        artifact.require(folder)


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_whenever_the_work_is_stopped_the_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int) -> None:
    """A making has three writes of ours (provenance, config, COMPLETE); stopped at any of them it leaves nothing that can be read."""
    real, writes = artifact.write_atomic, 0

    def stopping(path: Path, content: str | bytes) -> None:
        nonlocal writes
        writes += 1
        if writes == stop_at:
            raise KeyboardInterrupt
        real(path, content)

    monkeypatch.setattr(artifact, "write_atomic", stopping)
    with pytest.raises(KeyboardInterrupt):
        _make(tmp_path / "made")
    monkeypatch.undo()
    with pytest.raises(UserError, match="no COMPLETE mark"):
        artifact.require(tmp_path / "made")
    artifact.verify(_make(tmp_path / "made"))  # and the same request takes it up again


def test_a_missing_folder_and_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; run the stage that makes it"):
        artifact.require(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is an output of prism prep, but a checkpoint is needed here"):
        artifact.require(_make(tmp_path / "made"), "checkpoint")


def test_where_models_of_several_forms_are_taken_all_of_them_are_named(tmp_path: Path) -> None:
    from megatron_prism.engine import run_folder

    with pytest.raises(UserError, match="is an output of prism prep, but a checkpoint, a training run or a Hugging Face folder is needed here"):
        run_folder.find_weights(_make(tmp_path / "made"), "model")
    with pytest.raises(UserError, match="is an output of prism prep, but a checkpoint or a training run is needed here"):
        run_folder.resolve(tmp_path / "made")


def test_a_parent_that_is_not_finished_cannot_be_built_on(tmp_path: Path) -> None:
    half = artifact.begin(tmp_path / "half", "prep", Config())
    with pytest.raises(UserError, match="half has no COMPLETE mark"):
        artifact.begin(tmp_path / "child", "train", Config(), [half])
    assert not (tmp_path / "child").exists()


def test_a_file_of_another_size_is_found_at_every_reading(tmp_path: Path) -> None:
    folder = _make(tmp_path / "made")
    (folder / "inner/data.txt").write_text("content and more")
    with pytest.raises(UserError, match=r"data\.txt has 16 bytes, COMPLETE says 7 bytes: the artifact was changed"):
        artifact.require(folder)


def test_a_changed_byte_is_found_by_verify(tmp_path: Path) -> None:
    folder = _make(tmp_path / "made")
    artifact.verify(folder)
    (folder / "inner/data.txt").write_text("Content")
    artifact.require(folder)
    with pytest.raises(UserError, match="is not what COMPLETE recorded"):
        artifact.verify(folder)


@pytest.mark.parametrize("changed_byte", [0, -1])
def test_a_large_file_is_known_by_its_size_and_its_ends(tmp_path: Path, changed_byte: int) -> None:
    folder = artifact.begin(tmp_path / "large", "prep", Config())
    content = bytearray(artifact.HASH_CONTENT_UP_TO_BYTES + 5)
    (folder / "large.bin").write_bytes(content)
    artifact.complete(folder)
    artifact.verify(folder)
    content[changed_byte] = 1
    (folder / "large.bin").write_bytes(content)
    with pytest.raises(UserError, match="is not what COMPLETE recorded"):
        artifact.verify(folder)


def test_the_digest_changes_with_the_content_and_with_every_making(tmp_path: Path) -> None:
    digests = {artifact.digest(_make(tmp_path / name, content=content)) for name, content in (("a", "x"), ("b", "y"), ("c", "x"))}
    assert len(digests) == 3


def test_a_folder_is_current_for_its_own_config_and_parents_alone(tmp_path: Path) -> None:
    parent, other = _make(tmp_path / "parent"), _make(tmp_path / "other")
    child = _make(tmp_path / "child", parents=(parent,))
    assert artifact.is_current(child, Config(), [parent])
    assert artifact.changes(child, Config(seed=8), [parent]) == ["seed was 7, now 8"]
    assert artifact.changes(child, Config(), [other]) == [f"{other} is a new input", f"{parent} is no longer an input"]
    assert artifact.changes(child, Config(), []) == [f"{parent} is no longer an input"]
    assert artifact.changes(child, Config(), [parent, other]) == [f"{other} is a new input"]
    both = _make(tmp_path / "both", parents=(parent, other))
    assert artifact.changes(both, Config(), [other, parent]) == ["its inputs are in another order"]
    assert artifact.changes(both, Config(), [other]) == [f"{parent} is no longer an input"]
    assert not artifact.is_current(tmp_path / "nowhere", Config())


class NewerInner(Block):
    """A block that a later version added."""

    limit: int | None = None


class NewerConfig(Config):
    """The schema of a later version: keys with defaults, which no folder of today has."""

    size: int = 16
    inner: NewerInner = NewerInner()


def test_keys_that_a_later_version_added_leave_a_finished_folder_current(tmp_path: Path) -> None:
    folder = _make(tmp_path / "made", Config(seed=3))
    assert "size" not in (folder / "config.toml").read_text()
    assert artifact.is_current(folder, NewerConfig(seed=3))
    assert artifact.changes(folder, NewerConfig(seed=3, size=17)) == ["size was 16, now 17"]
    assert artifact.changes(folder, NewerConfig(seed=3, inner=NewerInner(limit=5))) == ["inner.limit was unset, now 5"]
    later = _make(tmp_path / "later", NewerConfig(seed=3))
    assert artifact.changes(later, Config(seed=3)) == ["size was 16, now unset", "inner was {}, now unset"]


def test_a_child_is_stale_when_its_parent_was_made_again(tmp_path: Path) -> None:
    parent = _make(tmp_path / "parent")
    child = _make(tmp_path / "child", parents=(parent,))
    shutil.rmtree(parent)
    assert artifact.changes(child, Config(), [parent]) == [f"its input {parent} is not finished"]
    _make(parent)
    assert artifact.changes(child, Config(), [parent]) == [f"its input {parent} was made again since"]


def test_a_project_that_was_moved_is_still_current(tmp_path: Path) -> None:
    _make(tmp_path / "old/child", parents=(_make(tmp_path / "old/parent"),))
    (tmp_path / "old").rename(tmp_path / "new")
    assert artifact.is_current(tmp_path / "new/child", Config(), [tmp_path / "new/parent"])


def test_a_finished_folder_is_not_written_over_by_another_request(tmp_path: Path) -> None:
    folder = _make(tmp_path / "made")
    with pytest.raises(UserError, match=r"finished prep of another request \(seed was 7, now 8\); choose another output \(output=\.\.\.\) or remove"):
        artifact.begin(folder, "prep", Config(seed=8))
    artifact.verify(folder)
    artifact.begin(folder, "prep", Config())
    assert not artifact.is_complete(folder), "the same request may make it again; while it does, nobody reads it"


def test_folders_that_are_not_ours_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    for name, words in (("home", "is not empty and was not made by a stage"), ("file", "is a file; an output is a folder")):
        with pytest.raises(UserError, match=words):
            artifact.begin(tmp_path / name, "prep", Config())
    with pytest.raises(UserError, match="is an output of prism prep, so an output of prism train cannot be written there"):
        artifact.begin(_make(tmp_path / "made"), "train", Config())
    assert (tmp_path / "home/thesis.tex").read_text() == "years of work"


def test_an_unfinished_folder_tells_what_it_was_begun_for(tmp_path: Path) -> None:
    from megatron_prism.config import config_hash

    assert artifact.begun_as(tmp_path / "made") is None
    artifact.begin(tmp_path / "made", "prep", Config())
    assert artifact.begun_as(tmp_path / "made") == config_hash(Config())


def test_a_run_that_went_on_keeps_the_record_of_each_session(tmp_path: Path) -> None:
    ids = []
    for _ in range(3):
        artifact.begin(tmp_path / "run", "train", Config())
        ids.append(json.loads((tmp_path / "run" / "provenance.json").read_text())["id"])
    found = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert [session["id"] for session in found["earlier_sessions"]] == ids[:2]
    assert found["earlier_sessions"][0]["command"] == sys.argv and found["id"] == ids[2]


def test_a_finished_run_that_is_begun_again_keeps_the_record_of_each_session_too(tmp_path: Path) -> None:
    ids = []
    for _ in range(3):
        artifact.begin(tmp_path / "run", "train", Config())
        artifact.complete(tmp_path / "run")
        ids.append(json.loads((tmp_path / "run" / "provenance.json").read_text())["id"])
    found = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert [session["id"] for session in found["earlier_sessions"]] == ids[:2] and found["id"] == ids[2]


def test_an_artifact_of_the_first_schema_is_read() -> None:
    provenance = artifact.require(FIXTURES / "artifact_v1", "prep")
    artifact.verify(FIXTURES / "artifact_v1")
    assert provenance["schema_version"] == 1 and provenance["host"]["name"] == "node1"
    assert artifact.changes(FIXTURES / "artifact_v1", Config(seed=8)) == ["seed was 7, now 8"]
    assert artifact.is_current(FIXTURES / "artifact_v1", Config())


@pytest.mark.parametrize("name", ["COMPLETE", "provenance.json"])
def test_a_newer_schema_is_refused(tmp_path: Path, name: str) -> None:
    folder = _make(tmp_path / "made")
    record = json.loads((folder / name).read_text())
    text = json.dumps({**record, "schema_version": artifact.SCHEMA_VERSION + 1})
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=f"has artifact schema {artifact.SCHEMA_VERSION + 1}, this version reads up to {artifact.SCHEMA_VERSION}"):
        artifact.require(folder)


def test_a_garbled_record_is_refused_by_name(tmp_path: Path) -> None:
    folder = _make(tmp_path / "made")
    (folder / "COMPLETE").write_text('{"schema_ver')
    with pytest.raises(UserError, match="COMPLETE cannot be read"):
        artifact.require(folder)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    artifact.write_atomic(path, "old")

    def power_cut(descriptor: int) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, "fsync", power_cut)
    with pytest.raises(OSError, match="power cut"):
        artifact.write_atomic(path, "new and longer")
    assert path.read_text() == "old"


def test_an_artifact_with_a_link_inside_is_never_completed(tmp_path: Path) -> None:
    folder = artifact.begin(tmp_path / "made", "prep", Config())
    (folder / "link").symlink_to("/etc/hostname")
    with pytest.raises(AssertionError, match="no symbolic links"):
        artifact.complete(folder)


def test_versions_that_changed_since_the_last_start_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(**versions: str) -> list[str]:
        monkeypatch.setattr(artifact, "package_versions", lambda: versions)
        return artifact.changed_versions(artifact.begin(tmp_path / "run", "prep", Config()))

    assert begin(torch="2.10", numpy="2.1") == []
    assert begin(torch="2.10", numpy="2.1") == []
    assert begin(torch="2.11", numpy="2.1", **{"flash-attn-4": "4.0.0b36"}) == ["flash-attn-4 none -> 4.0.0b36", "torch 2.10 -> 2.11"]
    assert begin(torch="2.11", numpy="2.1") == ["flash-attn-4 4.0.0b36 -> none"], "beside the last start, not the first"
