"""Running a program that nobody has read: no network, no files but a scratch folder, limits, and its end is the end of all it started.

Owns: starting the sandbox's inner process, talking to it, ending it. Refuses: to run where the protections cannot be had (`describe` says which
are on), unless the environment says PRISM_SANDBOX=unprotected. What happens inside stands in `supervisor`, the system calls in `confine`, the whole
in docs/grading.md.
"""

import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from megatron_prism.errors import UserError
from megatron_prism.grading.sandbox.frames import EndedError, Message, descriptors, hang_up, read_frame, readable, write_frame
from megatron_prism.grading.sandbox.idle import Spare
from megatron_prism.temporary import TemporaryFolder

Status = Literal["ok", "runtime_error", "time_limit", "wall_limit", "output_limit"]
UNPROTECTED = "PRISM_SANDBOX"
START_SECONDS = 120.0
END_SECONDS = 2.0
SYSTEM_PATHS = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom")
FIRST_UNUSED_UID = 1_600_000_000
QUICK = 0.1
"""share of the wall limit after which a run is watched: most are over by then, and looking costs time"""


class SandboxError(RuntimeError):
    """The sandbox itself failed, whatever the program did: no verdict follows from it."""


@dataclass(frozen=True)
class Limits:
    """For one run. cpu_seconds are what counts; wall_seconds (default: 5 times as many and 20 more) end a program that sleeps."""

    cpu_seconds: float = 6.0
    wall_seconds: float | None = None
    memory_bytes: int = 2 << 30
    output_bytes: int = 16 << 20
    scratch_bytes: int = 64 << 20

    @property
    def wall(self) -> float:
        return 5 * self.cpu_seconds + 20 if self.wall_seconds is None else self.wall_seconds


@dataclass(frozen=True)
class Outcome:
    """What a run did. output: standard output; result: what a function returned, as JSON; stderr: its end.

    spare_seconds: of a run that went over the wall limit: how long, at least, it could have run or slept as it pleased (see `idle`).
    """

    status: Status
    output: str
    result: str
    exit_code: int
    cpu_seconds: float
    wall_seconds: float
    peak_bytes: int
    stderr: str
    protections: Mapping[str, str] = field(default_factory=dict)
    spare_seconds: float = 0.0


class Sandbox:
    """One program, run any number of times, each in a fresh process. Use it as a context; one thread at a time."""

    def __init__(self, program: str, limits: Limits | None = None) -> None:
        if not sys.platform.startswith("linux"):
            raise UserError(f"graded programs run in a sandbox of Linux alone; this is {sys.platform}")
        self.program, self.limits = program, limits or Limits()
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: TemporaryFolder | None = None

    def run(self, stdin: str = "", *, function: str | None = None, arguments: Sequence[str] = (), files: Mapping[str, str] | None = None) -> Outcome:
        """The program on this standard input; with a function, that function of it on the input's lines, each one argument as JSON.

        arguments: sys.argv after the name. files: names and texts in the scratch folder.
        Errors: UserError where it would run unprotected; SandboxError.
        """
        limits = self.limits
        request: Message = {
            "function": function,
            "arguments": list(arguments),
            "files": dict(files or {}),
            "cpu_seconds": limits.cpu_seconds,
            "wall_seconds": limits.wall,
            "memory_bytes": limits.memory_bytes,
            "output_bytes": limits.output_bytes,
        }
        process = self._started()
        try:
            inbox, outbox = descriptors(process)
            write_frame(inbox, request, stdin.encode(errors="surrogateescape"))
            is_quick = bool(readable([outbox], limits.wall * QUICK))
            spare = None if is_quick else Spare()
            reply, payload = read_frame(outbox, limits.wall + START_SECONDS)
        except (EndedError, OSError) as error:
            self.close()
            raise SandboxError(f"the sandbox's inner process: {error}") from error
        if reply["status"] == "sandbox_failed":
            self.close()
            raise SandboxError(reply["stderr"])
        if not reply.pop("is_clean"):
            self.close()  # the next run has another scratch folder
        split = reply.pop("stdout_bytes")
        reply["spare_seconds"] = spare.seconds() if spare is not None and reply["status"] == "wall_limit" else 0.0
        return Outcome(output=payload[:split].decode(errors="replace"), result=payload[split:].decode(errors="replace"), **reply)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        self._folder = TemporaryFolder("program")
        supervisor = Path(__file__).with_name("supervisor.py")
        process = self._process = subprocess.Popen(
            [sys.executable, "-s", "-P", "-S", "-B", "-X", "utf8", str(supervisor)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment()
        )
        setup = {
            "program": self.program,
            "folder": str(self._folder.path),
            "readable": _readable(),
            "packages": _packages(),
            "scratch_bytes": self.limits.scratch_bytes,
            "uid": FIRST_UNUSED_UID + process.pid,
            "unprotected": os.environ.get(UNPROTECTED) == "unprotected",
        }
        try:
            inbox, outbox = descriptors(process)
            write_frame(inbox, setup)
            hello, _ = read_frame(outbox, START_SECONDS)
        except (EndedError, OSError) as error:
            self.close()
            raise SandboxError(f"the sandbox did not start: {error}") from error
        if "refused" in hello:
            self.close()
            raise UserError(
                f"graded programs would run unprotected here: {hello['refused']} ({hello['protections']}). Run where unshare(2) is permitted or the "
                f"kernel has Landlock (Linux 5.13), on x86_64 or aarch64; or set {UNPROTECTED}=unprotected to run them all the same"
            )
        return process

    def close(self) -> None:
        """End the program and all it started: asked first (so that the system counts its processor time as ours), then killed."""
        if self._process is not None:
            hang_up(self._process)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END_SECONDS)
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._folder is not None:
            self._folder.remove()
            self._folder = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


@cache
def describe() -> Mapping[str, str]:
    """The protections that a program has on this machine, by name; "off: why" for those it has not. Errors: as `Sandbox.run`."""
    with Sandbox("") as sandbox:
        return sandbox.run().protections


@cache
def _packages() -> list[str]:
    return sorted({sysconfig.get_path(name) for name in ("purelib", "platlib")})


@cache
def _readable() -> list[str]:
    """What Python and its packages need, and nothing else: not the home folder, not the repository, not the data."""
    base = os.path.realpath(sys.base_prefix)
    paths = [*SYSTEM_PATHS, *(f"{base}/{name}" for name in ("lib", "lib64")), sysconfig.get_path("stdlib"), *_packages()]
    kept: list[str] = []
    for path in sorted(set(paths), key=len):
        if not any(path.startswith(f"{parent}/") for parent in kept):
            kept.append(path)
    return kept


def _environment() -> dict[str, str]:
    """Nothing of ours: an environment can hold keys. A fixed hash seed, so that the same program gives the same output."""
    ours = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"}
    return ours | {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
