"""A child's output reaches the terminal and the log at once, and a terminal stays a terminal (so that progress lines stay alive)."""

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import runs

from megatron_prism.launch.child import Child

PARENT = """
import os, sys
from pathlib import Path
from megatron_prism.launch.child import Child

with Child([sys.executable, "-c", "import os, sys; print('terminal', sys.stdout.isatty(), os.get_terminal_size().columns)"], os.environ) as child:
    child.copy_output(Path(sys.argv[1]), title="probe")
    sys.exit(child.wait())
"""


def test_under_a_terminal_the_child_has_one_of_the_same_width(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    env = {**os.environ, "COLUMNS": "91", "LINES": "30"}
    process = subprocess.Popen([sys.executable, "-c", PARENT, tmp_path / "log"], stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL, env=env)
    os.close(theirs)
    try:
        assert process.wait(60) == 0, os.read(ours, 10000)
        assert os.read(ours, 10000) == b"terminal True 91\r\n"
        assert (tmp_path / "log").read_text().endswith("probe\nterminal True 91\n"), "the log has plain lines"
    finally:
        process.kill()
        os.close(ours)


def test_into_a_pipe_the_child_has_a_pipe_and_its_last_words_are_kept(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    code = "import sys; print(sys.stdout.isatty()); print('x' * 100_000); print('to stderr', file=sys.stderr); sys.exit(3)"
    with Child([sys.executable, "-u", "-c", code], os.environ) as child:
        kept = child.copy_output(tmp_path / "log", title="first")
        assert child.wait() == 3
    assert kept.endswith("xxx\nto stderr\n") and len(kept) == 1 << 16
    assert (tmp_path / "log").read_text().count("x") == 100_000


def test_leaving_early_ends_the_child_and_what_it_started(tmp_path: Path) -> None:
    code = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '300'], start_new_session=True); print(p.pid, flush=True); time.sleep(300)"
    with pytest.raises(KeyboardInterrupt), Child([sys.executable, "-c", code], os.environ) as child:
        while not (written := os.read(child._output, 100)):
            time.sleep(0.1)
        raise KeyboardInterrupt
    assert child.process.poll() is not None
    assert not runs(int(written))


def test_a_log_that_cannot_be_written_ends_nothing(caplog: pytest.LogCaptureFixture, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    with Child([sys.executable, "-u", "-c", "print('begun'); print('done')"], os.environ) as child:
        kept = child.copy_output(Path("/dev/full"), title="first")
        assert child.wait() == 0
    assert kept == "begun\ndone\n" == capfdbinary.readouterr().out.decode()
    assert [line.message for line in caplog.records] == [
        "/dev/full cannot be written (No space left on device): the output goes on to the terminal alone"
    ]
