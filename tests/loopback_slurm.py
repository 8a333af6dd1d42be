"""A real Slurm on this machine, for tests: munged, slurmctld, and a slurmd for each of some nodes, all in a temporary folder of their own.

Needs root and Debian's packages slurm-wlm and munge (.ci/run installs them). Nothing outside the folder is read or changed, and no node is more than
this machine's loopback address.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

SHOWN_CHARACTERS = 4000
JOBS = 20
"""numbers whose ports are looked at before the first job: more than a test queues"""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
CONFIG = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
FirstJobId={first_job}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
SlurmdTimeout=6
KillWait=5
MessageTimeout=30
SchedulerParameters=sched_interval=1
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=60
"""


def obstacle() -> str | None:
    """Why no Slurm can be started here; None if it can."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"no {', '.join(missing)} here: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "a Slurm of its own needs root"


class LoopbackSlurm:
    """The running cluster. variables: what a command needs in its environment to speak to it."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        self.variables = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        folder.chmod(0o711)  # munge wants its socket to be reached by all
        (folder / "state").mkdir()
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        host, ports = socket.gethostname(), _free_ports(nodes + 1)
        settings = {"host": host, "port": ports[-1], "folder": folder, "first_job": _first_job()}
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        lines = [f"NodeName={n} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2" for n, port in zip(self.nodes, ports, strict=False)]
        (folder / "slurm.conf").write_text(CONFIG.format(nodes="\n".join(lines), **settings))

    def start(self) -> None:
        """Start every daemon, and wait until the nodes are there."""
        places = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munge.pid", "seed-file": "munge.seed", "log-file": "munge.log"}
        self._start("munged", "munged", "--foreground", *(f"--{key}={self.folder / name}" for key, name in places.items()))
        self.wait_for(lambda: (self.folder / "munge.sock").exists(), 20, "munged")
        self._start("slurmctld", "slurmctld", "-D", "-c")
        for node in self.nodes:
            self.start_node(node)
        self.wait_for(lambda: self.ask("sinfo", "--noheader", "--format=%T %D").strip() == f"idle {len(self.nodes)}", 60, "the nodes")

    def start_node(self, node: str) -> None:
        """Start a node's slurmd, which knows of no earlier job."""
        shutil.rmtree(self.folder / f"spool-{node}", ignore_errors=True)
        (self.folder / f"spool-{node}").mkdir()
        self._start(node, "slurmd", "-D", "-N", node)

    def lose_node(self, node: str) -> None:
        """SIGKILL for a node's slurmd, its slurmstepds and everything that runs there: a machine without power. Slurm misses it after a while."""
        tasks = [process for process in psutil.process_iter() if self._is_at(process, node)]
        keepers = {parent for task in tasks for parent in task.parents() if parent.name().startswith("slurmstepd")}
        assert tasks, f"nothing runs on {node}"
        for process in [psutil.Process(self._daemons[node].pid), *keepers, *tasks]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self._daemons.pop(node).wait(30)

    def return_node(self, node: str) -> None:
        """Start a lost node again, and wait until it takes jobs."""
        self.start_node(node)
        self.wait_for(lambda: "State=IDLE " in self.ask("scontrol", "--oneliner", "show", "node", node), 60, f"{node} to return")

    def ask(self, *words: str) -> str:
        """What one of Slurm's commands answers."""
        done = subprocess.run(words, env={**os.environ, **self.variables}, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job; empty for none."""
        return dict(word.split("=", 1) for word in self.ask("scontrol", "--oneliner", "show", "job", number).split() if "=" in word)

    def wait_for(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Until it holds; AssertionError with what Slurm knows and wrote when it does not in time."""
        try:
            wait_for(condition, seconds, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.report()}") from None

    def report(self) -> str:
        """What Slurm knows of its jobs, steps and nodes, the end of each daemon's log, and what runs here."""
        asked = [["scontrol", "--oneliner", "show", what] for what in ("job", "step", "node")]
        parts = [f"--- {' '.join(words)} ---\n{self.ask(*words)}" for words in asked] if "slurmctld" in self._daemons else []
        files = [path for path in sorted(self.folder.glob("*")) if path.suffix in (".log", ".out") and path.stat().st_size]
        parts += [f"--- {path.name} ---\n{path.read_text(errors='replace')[-SHOWN_CHARACTERS:]}" for path in files]
        return "\n".join(
            [*parts, "--- processes of jobs ---", *(_described(process) for process in psutil.process_iter() if self._is_at(process, None))]
        )

    def is_at_rest(self) -> bool:
        """Whether nothing of any job is left, neither for slurmctld nor among this machine's processes."""
        nodes = self.ask("sinfo", "--noheader", "--format=%T").split()
        return {*nodes} == {"idle"} and not any(self._is_at(process, None) for process in psutil.process_iter())

    def stop(self) -> None:
        """Cancel every job and end every daemon."""
        if "slurmctld" in self._daemons:
            self.ask("scancel", "--user=root")
            with contextlib.suppress(AssertionError):
                wait_for(lambda: not self.ask("squeue", "--noheader").strip(), 20, "jobs to end")
        left = [process for process in psutil.process_iter() if self._is_at(process, None)]
        for daemon in self._daemons.values():
            daemon.terminate()
        for daemon in self._daemons.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _start(self, name: str, *words: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            path = shutil.which(words[0], path=self.variables["PATH"])
            env = {**os.environ, **self.variables}
            self._daemons[name] = subprocess.Popen([str(path), *words[1:]], stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=env)

    def _is_at(self, process: psutil.Process, node: str | None) -> bool:
        """Whether a process belongs to a job of ours, on this node or on any."""
        try:
            found = process.environ()
        except (psutil.Error, OSError):
            return False
        ours = found.get("SLURM_CONF") == self.variables["SLURM_CONF"] and "SLURM_JOB_ID" in found
        return ours and (node is None or found.get("SLURMD_NODENAME") == node)


@contextlib.contextmanager
def loopback_slurm(nodes: int) -> Iterator[LoopbackSlurm]:
    """A cluster of so many nodes, gone with all its jobs afterwards."""
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as name:
        cluster = LoopbackSlurm(Path(name), nodes)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Until it holds; AssertionError when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.2)


def _first_job() -> int:
    """A number to count jobs from, whose ports and those of the next jobs nobody has.

    A job's ranks meet at 20000 + number % 12000 (launch/slurm.py). Counted from 1, two Slurms of one machine met at one port, and under one name: the
    ranks of the one waited for those of the other for ever.
    """
    for _ in range(100):
        first = random.randrange(JOBS, 12000 - JOBS)
        if all(_is_free(20000 + number) for number in range(first, first + JOBS)):
            return first
    raise AssertionError(f"no {JOBS} free ports beside each other between 20000 and 32000")


def _is_free(port: int) -> bool:
    with socket.socket() as place:
        try:
            place.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _described(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {process.status()} {process.create_time():.0f} {' '.join(process.cmdline())[:200]}"
    except psutil.Error:
        return f"{process.pid} gone"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for place in sockets:
        place.bind(("127.0.0.1", 0))
    ports = [place.getsockname()[1] for place in sockets]
    for place in sockets:
        place.close()
    return ports
