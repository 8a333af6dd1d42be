"""Checksums of checkpoints: taken as files are written, compared by whoever reads them, and absent from what earlier versions wrote."""

import errno
import io
import json
import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_prism import artifact, checksums
from megatron_prism.checksums import BLOCK_BYTES, Checksum, DamagedError, Summing
from megatron_prism.config import Block
from megatron_prism.engine import device, integrity, parallel, run_folder
from megatron_prism.engine.sharded import Piece, Reader, write_streaming
from megatron_prism.errors import MachineError, UnreadableError, UserError
from megatron_prism.stages import verify

pytestmark = pytest.mark.usefixtures("leave_groups")


class Nothing(Block):
    """A config of next to nothing."""

    key: int = 1


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 2 * BLOCK_BYTES])
def test_a_checksum_taken_while_writing_is_that_of_the_file_however_it_was_cut(tmp_path, size):
    content = os.urandom(size)
    buffer = io.BytesIO()
    file, start = Summing(buffer), 0
    for length in (1, 7, BLOCK_BYTES - 8, BLOCK_BYTES, 10**9):
        file.write(content[start : start + length])
        start += length
    (tmp_path / "file").write_bytes(content)
    assert buffer.getvalue() == content
    assert file.checksum() == checksums.of_file(tmp_path / "file") == checksums.of_bytes(content)
    assert checksums.damage(tmp_path / "file", file.checksum()) is None


def test_one_bit_in_any_block_is_found_with_its_place(tmp_path):
    path, content = tmp_path / "file", bytearray(2 * BLOCK_BYTES + 5)
    expected = checksums.of_bytes(bytes(content))
    for place, words in ((0, f"bytes 0 to {BLOCK_BYTES - 1} "), (len(content) - 1, f"bytes {2 * BLOCK_BYTES} to {2 * BLOCK_BYTES + 4} ")):
        content[place] ^= 128
        path.write_bytes(content)
        assert words in (checksums.damage(path, expected) or "")
        assert checksums.damage(path, expected, [1]) is None  # that block is whole
        content[place] ^= 128


def write_checkpoint(folder: Path, **tensors: torch.Tensor) -> Path:
    """A complete checkpoint of a few tensors."""
    artifact.begin(folder, "checkpoint", Nothing())
    write_streaming(folder / "sharded", [Piece(name, [value]) for name, value in tensors.items()], 1)
    (folder / "hf").mkdir()
    (folder / "hf" / "tokenizer.json").write_text("x" * 3_000_000)
    artifact.complete(folder)
    return folder


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def start_alone() -> None:
    device.setup("cpu")
    parallel.start(device.CPU)
    assert dist.get_world_size() == 1


def test_every_file_of_a_checkpoint_has_a_checksum_and_a_flipped_bit_in_each_is_found(tmp_path):
    start_alone()
    folder = write_checkpoint(tmp_path / "made", table=torch.arange(5000.0))
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {artifact.COMPLETE}
    expected, wrong = artifact.expected_checksums(folder)
    assert expected is not None and set(expected) == names and wrong == [] and integrity.damages(folder) == []
    for name in sorted(names):
        copy = tmp_path / name.replace("/", "_")
        shutil.copytree(folder, copy)
        flip(copy / name, (copy / name).stat().st_size // 2)
        assert any(str(copy / name) in text for text in integrity.damages(copy)), name
        with pytest.raises(UserError, match=r"is not what was written|cannot be read"):
            artifact.verify(copy)


def test_a_complete_mark_that_lost_its_checksums_is_damage_not_an_old_checkpoint(tmp_path):
    start_alone()
    folder = write_checkpoint(tmp_path / "made", table=torch.ones(3))
    record = json.loads((folder / artifact.COMPLETE).read_text())
    record["checksuns"] = record.pop("checksums")
    (folder / artifact.COMPLETE).write_text(json.dumps(record))
    assert ["COMPLETE is damaged" in text for text in integrity.damages(folder)] == [True]


def test_a_checkpoint_of_an_earlier_version_is_read_and_said_to_have_no_checksums(tmp_path, caplog):
    start_alone()
    folder = write_checkpoint(tmp_path / "made", table=torch.ones(3))
    (folder / "sharded" / checksums.TABLE).unlink()
    record = json.loads((folder / artifact.COMPLETE).read_text())
    del record["checksums"], record["files"][f"sharded/{checksums.TABLE}"]
    (folder / artifact.COMPLETE).write_text(json.dumps(record))
    integrity.require_whole(folder)
    assert [entry.message for entry in caplog.records if "has no checksums" in entry.message] != []
    assert torch.equal(Reader(folder / "sharded").read("table"), torch.ones(3))
    (folder / "hf" / "tokenizer.json").write_text("short")
    with pytest.raises(DamagedError, match=r"tokenizer\.json has 5 bytes"):
        integrity.require_whole(folder)


class Refused:
    """While it is entered and not mended, the file system has an error for whoever asks for this file."""

    def __init__(self, path: Path, number: int) -> None:
        self.path, self.number, self.looks, self.mended = path, number, 0, False

    def __enter__(self) -> "Refused":
        self._patches = [mock.patch.object(Path, name, self._instead_of(getattr(Path, name))) for name in ("stat", "open")]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self._patches:
            patch.stop()

    def _instead_of(self, right):
        def looked_at(path, *words, **more):
            if path == self.path and not self.mended:
                self.looks += 1
                raise OSError(self.number, os.strerror(self.number))
            return right(path, *words, **more)

        return looked_at


FILES = pytest.mark.parametrize("name", ["sharded/__0_0.distcp", "sharded/checksums.json", "config.toml", artifact.COMPLETE])
LOOKS = (integrity.damages, integrity.require_whole, artifact.verify)


@FILES
def test_a_file_that_cannot_be_read_is_no_damage_and_one_that_can_a_moment_later_is_whole(tmp_path, monkeypatch, name):
    start_alone()
    file = write_checkpoint(tmp_path / "made", table=torch.ones(9)) / name
    waited = []
    monkeypatch.setattr(checksums.time, "sleep", waited.append)
    with Refused(file, errno.EIO):
        for look in LOOKS:
            with pytest.raises(MachineError, match=rf"{name} could not be read, nor 2 s later: .*\(EIO\).*Start the same command again"):
                look(tmp_path / "made")
    assert set(waited) == {checksums.RETRY_SECONDS}
    with Refused(file, errno.ESTALE) as refused:
        monkeypatch.setattr(checksums.time, "sleep", lambda _: setattr(refused, "mended", True))
        assert integrity.damages(tmp_path / "made") == [] and refused.looks == 1


FOR_PEOPLE = [
    (errno.EACCES, "give this user leave"),
    (errno.EPERM, "give this user leave"),
    (errno.EISDIR, "a folder lies"),
    (errno.ELOOP, "symbolic links lead round"),
]


@FILES
@pytest.mark.parametrize(("number", "words"), FOR_PEOPLE)
def test_a_file_that_somebody_has_to_give_leave_for_is_said_at_once_and_is_no_damage_either(tmp_path, monkeypatch, name, number, words):
    start_alone()
    run = artifact.begin(tmp_path / "run", "train", Nothing())
    for step in (1, 2):
        write_checkpoint(run_folder.step_folder(run, step), table=torch.ones(9))
    newest = run_folder.step_folder(run, 2)
    monkeypatch.setattr(checksums.time, "sleep", lambda _: pytest.fail("it was tried again"))
    with Refused(newest / name, number):
        for look in (*LOOKS, lambda _: integrity.choose(run, "train", "previous")):
            with pytest.raises(UnreadableError, match=rf"{name} could not be read: .*\({errno.errorcode[number]}\).*Mend it first: {words}"):
                look(newest)
    assert not issubclass(UnreadableError, MachineError), "status 2"
    assert integrity.choose(run, "train", "previous") == newest


def test_verify_says_of_such_a_file_that_it_was_not_read(tmp_path, capsys):
    """And not that it is damaged; by a link that really leads round."""
    file = write_checkpoint(tmp_path / "made", table=torch.ones(9)) / "config.toml"
    file.rename(tmp_path / "config.toml")
    file.symlink_to(file)
    with pytest.raises(MachineError, match="1 could not be read"):
        verify.run([tmp_path / "made"])
    assert "NOT READ" in capsys.readouterr().out
    file.unlink()
    (tmp_path / "config.toml").rename(file)
    verify.run([tmp_path / "made"])


def test_a_folder_in_a_marks_place_is_told_as_one(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(UnreadableError, match=r"could not be read: Is a directory \(EISDIR\)"):
        checksums.reading(tmp_path / "file", (tmp_path / "file").read_bytes)


def test_no_checkpoint_is_set_aside_for_a_read_that_fails(tmp_path, monkeypatch):
    start_alone()
    run = artifact.begin(tmp_path / "run", "train", Nothing())
    for step in (1, 2):
        write_checkpoint(run_folder.step_folder(run, step), table=torch.ones(9))
    newest = run_folder.step_folder(run, 2)
    right = checksums._block

    def refused(file, index, size):
        if "step_00000002/sharded/__0_0" in file.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return right(file, index, size)

    monkeypatch.setattr(checksums.time, "sleep", lambda _: None)
    with monkeypatch.context() as patched, pytest.raises(MachineError, match=r"__0_0\.distcp could not be read.*Input/output error \(EIO\)"):
        patched.setattr(checksums, "_block", refused)
        integrity.choose(run, "train", "previous")
    assert run_folder.newest(run) == newest and integrity.choose(run, "train", "previous") == newest
    with Refused(run / artifact.PROVENANCE, errno.EIO), pytest.raises(MachineError, match=r"provenance\.json could not be read") as raised:
        integrity.choose(run, "train", "previous")
    assert "remove the folder" not in str(raised.value)


def test_a_disk_that_is_gone_is_waited_for_once_and_not_for_each_file(tmp_path, monkeypatch):
    start_alone()
    checkpoint = write_checkpoint(tmp_path / "made", table=torch.ones(9))
    expected, looks = {f"file{number}": checksums.of_bytes(b"x") for number in range(400)}, []

    def gone(path):
        looks.append(path)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checksums, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(Path, "stat", gone)
    for look in (lambda: integrity._own_damages(checkpoint, expected, 0), lambda: checksums.damages(checkpoint, expected)):
        with pytest.raises(MachineError):
            look()
    assert len(looks) < 200, "of 1600: those under way, and their second tries"


def test_a_reader_compares_what_it_reads_and_nothing_else(tmp_path):
    large, small = torch.zeros(BLOCK_BYTES // 2), torch.arange(9.0)
    write_streaming(tmp_path, [Piece("large", [large]), Piece("small", [small])], 1)
    flip(tmp_path / "__0_0.distcp", BLOCK_BYTES // 2)  # inside the first block, which only `large` lies in
    reader = Reader(tmp_path)
    assert torch.equal(reader.read("small"), small)
    with pytest.raises(DamagedError, match=r"__0_0\.distcp is not what was written: bytes 0 to 16777215 have checksum \w{32}; expected \w{32}"):
        reader.read("large", slice(0, 1))


def test_the_ranks_shares_are_all_blocks_once_and_near_equal():
    files = {"sharded/__0_0.distcp": Checksum(100 * BLOCK_BYTES, ["x"] * 100), "sharded/__1_0.distcp": Checksum(3 * BLOCK_BYTES, ["x"] * 3)}
    files |= {"state.json": Checksum(5, ["x"]), "hf/empty": Checksum(0, [])}
    for ranks in (1, 2, 3, 7):
        shares = integrity._shares(files, ranks)
        taken = sorted((name, block) for share in shares for name, blocks in share for block in blocks)
        assert taken == sorted((name, block) for name, found in files.items() for block in range(len(found.blocks)))
        assert {name for share in shares for name, _ in share} == set(files)  # an empty file too
        assert max(sum(len(blocks) for _, blocks in share) for share in shares) <= -(-104 // ranks) + integrity.BLOCKS


def test_the_newest_whole_checkpoint_before_a_damaged_one_is_offered_and_none_is_said_too(tmp_path):
    start_alone()
    one, two, three = (write_checkpoint(run_folder.step_folder(tmp_path, step), table=torch.ones(9)) for step in (1, 2, 3))
    flip(three / "sharded/__0_0.distcp", 9)
    with pytest.raises(DamagedError, match=rf"__0_0\.distcp is not what .*{two} is whole: start from it"):
        integrity.require_whole(three)
    flip(two / "hf/tokenizer.json", 1_500_000)
    with pytest.raises(DamagedError, match=f"{one} is whole"):
        integrity.require_whole(three)
    (one / "sharded/common.pt").unlink()
    with pytest.raises(DamagedError, match="there is no whole checkpoint before it"):
        integrity.require_whole(three)
