"""A temporary folder lives as long as its owner, kill -9 or not, and no other is touched."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prism.temporary import KEPT, TemporaryFolder, clear

OWNER = """
import sys
from pathlib import Path
from megatron_prism.temporary import TemporaryFolder
folder = TemporaryFolder("thing", Path(sys.argv[1]))
(folder.path / "file").write_text("x")
print(folder.path, flush=True)
input()
"""


def owner(parent: Path) -> tuple["subprocess.Popen[str]", Path]:
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(parent)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_process_left_is_cleared_away_and_what_a_living_one_has_is_not(tmp_path: Path) -> None:
    (killed, left), (living, used) = owner(tmp_path), owner(tmp_path)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert (left / "file").is_file()
    with TemporaryFolder("thing", tmp_path) as mine:
        assert not left.exists()
        assert (used / "file").is_file()
        clear("thing", tmp_path)
        assert mine.path.is_dir()
    assert not mine.path.exists()
    living.communicate("\n", timeout=60)
    clear("thing", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_links_other_kinds_and_what_is_kept_stay(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (tmp_path / "prism-thing-link").symlink_to(precious)
    (tmp_path / "prism-other-abc").mkdir()
    (tmp_path / "prism-thing-file").touch()
    log = TemporaryFolder("thing", tmp_path)
    log.keep()
    dead = tmp_path / "prism-thing-dead"
    dead.mkdir()
    clear("thing", tmp_path)
    assert not dead.exists()
    assert (log.path / KEPT).exists()
    assert {"precious", "prism-thing-link", "prism-other-abc", "prism-thing-file"} <= {path.name for path in tmp_path.iterdir()}


def test_another_users_folder_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = tmp_path / "prism-thing-theirs"
    theirs.mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    clear("thing", tmp_path)
    assert theirs.is_dir()
