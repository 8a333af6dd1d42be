"""Two runs in one folder: the second waits, and is refused where the first is seen to live; a kill leaves no lock, and a lost machine's may pass."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_prism.engine import run_lock
from megatron_prism.errors import MachineError, UserError

HOLDS = """
import sys
from pathlib import Path
from megatron_prism.engine import run_lock
with run_lock.held(Path(sys.argv[1])):
    if len(sys.argv) > 2:
        (Path(sys.argv[1]) / run_lock.FILE).write_text(sys.argv[2])
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(run: Path, *words: str) -> "subprocess.Popen[str]":
    """Another process that has the folder until its input is closed; words: what its file says instead."""
    other = subprocess.Popen([sys.executable, "-c", HOLDS, str(run), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    return other


@pytest.fixture
def other(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator["subprocess.Popen[str]"]:
    """A process that has tmp_path / "run"; parameters: as `hold`'s words."""
    process = hold(tmp_path / "run", *getattr(request, "param", ()))
    yield process
    process.kill()
    process.wait()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "WAIT_SECONDS", 0.5)
    monkeypatch.setattr(run_lock, "LOOK_SECONDS", 0.05)


def test_a_second_run_is_refused_while_another_process_has_the_folder_and_not_after_it_was_killed(tmp_path: Path, other, caplog) -> None:
    run = tmp_path / "run"
    with pytest.raises(UserError, match=f"is being written by process {other.pid} on .*, which lives: ") as raised, run_lock.held(run):
        pass
    assert not isinstance(raised.value, MachineError), "the same start would meet the same run"
    assert [f"by process {other.pid} on" in line.message and "waiting up to 0.5 s" in line.message for line in caplog.records] == [True]
    other.kill()
    other.wait()
    assert (run / run_lock.FILE).is_file(), "what a kill leaves"
    with run_lock.held(run):
        assert str(os.getpid()) in (run / run_lock.FILE).read_text() and run_lock.is_held(run)
    assert not run.exists() and not run_lock.is_held(run), "nothing was begun in it"


NOT_SEEN = [["process 1 on node-that-is-lost\n0-0 7"], [f"process {os.getpid()} on {os.uname().nodename}"], [""]]


@pytest.mark.parametrize("other", NOT_SEEN, indirect=True)
def test_a_lock_of_which_nobody_knows_whether_its_holder_lives_may_pass(tmp_path: Path, other) -> None:
    """Of another machine; of an earlier version, which wrote less; of a file that nobody can read."""
    with pytest.raises(MachineError, match=r"start the same command again; .* remove .*\.running\.tmp before"), run_lock.held(tmp_path / "run"):
        pass


def test_a_folder_is_waited_for(tmp_path: Path, other, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "WAIT_SECONDS", 60.0)
    threading.Timer(0.5, other.kill).start()
    with run_lock.held(tmp_path / "run"):
        assert run_lock.is_held(tmp_path / "run")


def test_who_waits_gets_the_folder_that_its_holder_removes_because_it_began_nothing(tmp_path: Path, other, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "WAIT_SECONDS", 60.0)
    threading.Timer(0.5, other.stdin.close).start()
    with run_lock.held(tmp_path / "run"):
        assert run_lock.is_held(tmp_path / "run") and str(os.getpid()) in (tmp_path / "run" / run_lock.FILE).read_text()


MOMENTS = ["mkdir", "open", "stat", "exists"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_folder_may_vanish_at_any_moment_of_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """As when its holder leaves: right after it was made, opened, or asked for (if it is at all); before its file is asked whether it is the one."""
    run, right, gone = tmp_path / "run", getattr(Path, moment), []
    if moment != "mkdir":
        run.mkdir()

    def vanishing(path: Path, *words: object, **more: object) -> object:
        first = not gone and path in ((run, run / run_lock.FILE) if moment in ("mkdir", "open") else (run / run_lock.FILE,))
        if first and moment == "stat":
            gone.append(shutil.rmtree(run))
        found = right(path, *words, **more)
        if first and moment != "stat":
            gone.append(shutil.rmtree(run))
        return found

    with monkeypatch.context() as patched:
        patched.setattr(Path, moment, vanishing)
        with run_lock.held(run):
            assert run_lock.is_held(run) and str(os.getpid()) in (run / run_lock.FILE).read_text()


def test_a_link_that_leads_nowhere_is_an_error_and_no_endless_try(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(tmp_path / "gone")
    with pytest.raises(FileExistsError), run_lock.held(tmp_path / "run"):
        pass


def test_a_run_whose_file_was_removed_leaves_that_of_the_next_one(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with run_lock.held(run):
        (run / run_lock.FILE).unlink()
        next_one = hold(run)
    assert str(next_one.pid) in (run / run_lock.FILE).read_text()
    next_one.kill()
    next_one.wait()


@pytest.mark.parametrize("times", [1, 1000])
def test_a_failure_of_the_moment_is_no_lack_of_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog, times: int) -> None:
    """A stale handle of a file server passes, and is waited for; one that stays ends the start, which may be tried again."""
    failed, real = [], fcntl.flock

    def flock(file: object, how: int) -> None:
        if len(failed) < times:
            failed.append(how)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    run = tmp_path / "run"
    if times == 1:
        with run_lock.held(run):
            assert run_lock.is_held(run)
    else:
        with pytest.raises(MachineError, match=r"cannot be locked \(Stale file handle\), after 0.5 s still"), run_lock.held(run):
            pass
    assert ["Stale file handle" in line.message and "waiting up to 0.5 s" in line.message for line in caplog.records] == [True]
