"""Run a script on N real ranks (gloo on a CPU), with a hard time limit.

    from multirank import run_ranks
    run_ranks(Path(__file__).parent / "some_script.py", 4, "--layout", "tp2")

The script finds what torchrun would tell it (RANK, WORLD_SIZE, MASTER_ADDR ... are set); it builds the process group itself. Ranks are forked from
tests/rank_server.py, which has imported what they need: one such server for each environment, for as long as the tests run.
On failure or time-out every process of this launch, and no other, is killed, and the AssertionError shows what each rank wrote.
"""

import atexit
import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import psutil

TESTS = Path(__file__).resolve().parent
SHOWN_CHARACTERS = 6000
START_SECONDS = 240.0
"""what the imports of a server may take"""


def run_ranks(
    script: Path, ranks: int, *args: str, timeout: float = 240, env: dict[str, str] | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run `script` on `ranks` processes; stdout and stderr of the result are those of rank 0, then rank 1, ...

    timeout: seconds. env: variables to set besides ours. check=False: a non-zero exit status is returned, not raised.
    Errors: AssertionError with each rank's output when the script fails (check=True) or runs out of time.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as logs:
        request = {"script": str(script), "args": args, "ranks": ranks, "env": _environment(env), "logs": logs}
        with _Server.taken(env) as server:
            status = server.ask(request, timeout)
        if status is None:
            raise AssertionError(f"{script.name} on {ranks} ranks ran past {timeout:g} s\n{_report(Path(logs))}")
        if check and status:
            raise AssertionError(f"{script.name} on {ranks} ranks exited with status {status}\n{_report(Path(logs))}")
        command = [str(script), *args]
        return subprocess.CompletedProcess(command, status, _joined(Path(logs), "stdout.log"), _joined(Path(logs), "stderr.log"))


class _Server:
    """A process that forks ranks; it serves one launch at a time."""

    idle: ClassVar[dict[str, list["_Server"]]] = defaultdict(list)
    lock = threading.Lock()

    def __init__(self, env: dict[str, str] | None) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self.process = subprocess.Popen(
            [sys.executable, str(TESTS / "rank_server.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=_environment(env), start_new_session=True,
        )  # fmt: skip
        atexit.register(self.close)
        self._answer(START_SECONDS)

    @classmethod
    @contextlib.contextmanager
    def taken(cls, env: dict[str, str] | None) -> Iterator["_Server"]:
        """One that nobody else asks meanwhile."""
        key = json.dumps(env, sort_keys=True)
        with cls.lock:
            server = cls.idle[key].pop() if cls.idle[key] else cls(env)
        try:
            yield server
        except BaseException:
            server.close()
            raise
        if server.process.poll() is None:
            with cls.lock:
                cls.idle[key].append(server)

    def ask(self, request: dict[str, Any], seconds: float) -> int | None:
        """The launch's status; None where time ran out, and the server is gone with the ranks."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self._answer(seconds)
        return None if answer is None else int(json.loads(answer)["status"])

    def _answer(self, seconds: float) -> str | None:
        """Its next line. Errors: AssertionError with what it wrote, where it has ended."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:  # select.select knows no descriptor beyond 1,023
            selector.register(self.process.stdout, selectors.EVENT_READ)
            answered = bool(selector.select(seconds))
        if not answered:
            self.close()
            return None
        answer = self.process.stdout.readline()
        if not answer:
            self.errors.seek(0)
            raise AssertionError(f"the server of ranks ended:\n{self.errors.read()[-SHOWN_CHARACTERS:]}")
        return answer

    def close(self) -> None:
        """End it, and its ranks."""
        kill_tree(self.process.pid)
        self.process.wait()


def kill_tree(pid: int) -> None:
    """SIGKILL one process and all its descendants (each rank has a session of its own, so a group kill misses them)."""
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=10)


def _environment(extra: dict[str, str] | None) -> dict[str, str]:
    """One thread a rank; scripts may import the helpers beside this file; no folder shadows an installed package."""
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **ours, **(extra or {})}


def _rank_files(logs: Path, name: str) -> list[Path]:
    return sorted(logs.glob(f"*/attempt_0/*/{name}"), key=lambda path: int(path.parent.name))


def _joined(logs: Path, name: str) -> str:
    return "".join(path.read_text(errors="replace") for path in _rank_files(logs, name))


def _report(logs: Path) -> str:
    parts = [
        f"--- rank {path.parent.name}, {path.stem} ---\n{path.read_text(errors='replace')[-SHOWN_CHARACTERS:]}"
        for name in ("stdout.log", "stderr.log")
        for path in _rank_files(logs, name)
        if path.stat().st_size
    ]
    return "\n".join(parts)
