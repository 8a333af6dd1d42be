"""Run a script on N real ranks (gloo on a CPU) through torchrun, with a hard time limit.

    from multirank import run_ranks
    run_ranks(Path(__file__).parent / "some_script.py", 4, "--layout", "tp2")

The script is started as `torchrun` starts it (RANK, WORLD_SIZE, MASTER_ADDR ... are set); it builds the process group itself.
On failure or time-out every process of this launch, and no other, is killed, and the AssertionError shows what each rank wrote.
"""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

TESTS = Path(__file__).resolve().parent
SHOWN_CHARACTERS = 6000
PR_SET_PDEATHSIG = 1


def run_ranks(
    script: Path, ranks: int, *args: str, timeout: float = 240, env: dict[str, str] | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run `script` on `ranks` processes; stdout and stderr of the result are those of rank 0, then rank 1, ...

    timeout: seconds. env: variables to set besides ours. check=False: a non-zero exit status is returned, not raised.
    Errors: AssertionError with each rank's output when the script fails (check=True) or runs out of time.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as logs:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "0", "--nproc-per-node", str(ranks)]
        command += ["--redirects", "3", "--log-dir", logs, str(script), *args]
        launcher = Path(logs) / "launcher.log"
        with launcher.open("wb") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment(env), preexec_fn=_die_with_parent)
            try:
                status = process.wait(timeout)
            except subprocess.TimeoutExpired:
                kill_tree(process.pid)
                raise AssertionError(f"{script.name} on {ranks} ranks ran past {timeout:g} s\n{_report(Path(logs), launcher)}") from None
            except BaseException:
                kill_tree(process.pid)
                raise
        if check and status:
            raise AssertionError(f"{script.name} on {ranks} ranks exited with status {status}\n{_report(Path(logs), launcher)}")
        return subprocess.CompletedProcess(command, status, _joined(Path(logs), "stdout.log"), _joined(Path(logs), "stderr.log"))


def kill_tree(pid: int) -> None:
    """SIGKILL one process and all its descendants (torchrun gives each rank a session of its own, so a group kill misses them)."""
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


def _die_with_parent() -> None:
    """In the child: a pytest that is killed takes its launcher along (and a launcher on SIGTERM its ranks)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _environment(extra: dict[str, str] | None) -> dict[str, str]:
    """One thread a rank; scripts may import the helpers beside this file; no folder shadows an installed package."""
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **ours, **(extra or {})}


def _rank_files(logs: Path, name: str) -> list[Path]:
    return sorted(logs.glob(f"*/attempt_0/*/{name}"), key=lambda path: int(path.parent.name))


def _joined(logs: Path, name: str) -> str:
    return "".join(path.read_text(errors="replace") for path in _rank_files(logs, name))


def _report(logs: Path, launcher: Path) -> str:
    parts = [
        f"--- rank {path.parent.name}, {path.stem} ---\n{path.read_text(errors='replace')[-SHOWN_CHARACTERS:]}"
        for name in ("stdout.log", "stderr.log")
        for path in _rank_files(logs, name)
        if path.stat().st_size
    ]
    return "\n".join([*parts, f"--- torchrun ---\n{launcher.read_text(errors='replace')[-SHOWN_CHARACTERS:]}"])
