"""The folder that outputs go to: how fast its disk is, and whether renames, syncs, maps, locks and clocks mean what checkpoints rely on.

Every trial happens in a folder of its own inside it, which is removed. The partner of a trial is another process, as another rank would be.
"""

import fcntl
import mmap
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from megatron_prism.artifact import sync_folder, temporary_of, write_atomic
from megatron_prism.doctor import Asked, Finding
from megatron_prism.temporary import TemporaryFolder

WRITTEN_BYTES = 64 << 20
CHUNK = os.urandom(1 << 20)
SLOW_MB_PER_SECOND = 100
PARTNER_SECONDS = 10
SKEW_SECONDS = 1.0
MB = 1e6

READ_MAPPED = "import sys, mmap; f = open(sys.argv[1], 'rb'); sys.exit(mmap.mmap(f.fileno(), 4, prot=mmap.PROT_READ)[:4] != b'new!')"
TAKE_LOCK = (
    "import sys, fcntl\nfile = open(sys.argv[1])\ntry: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\nexcept BlockingIOError: sys.exit(3)\n"
)
READ_ALWAYS_WHOLE = (
    "import sys, time\n"
    "end = time.monotonic() + 1\n"
    "print('ready', flush=True)\n"
    "while time.monotonic() < end:\n"
    "    with open(sys.argv[1], 'rb') as file: text = file.read()\n"
    "    assert len(text) == 4096 and len(set(text)) == 1, len(text)\n"
)


def disk(asked: Asked) -> list[Finding]:
    """Megabytes a second written (fsync included) and read back past the cache, of 64 MiB or a tenth of the free space."""
    try:
        size = min(WRITTEN_BYTES, shutil.disk_usage(asked.path).free // 10)
        with TemporaryFolder("doctor", Path(asked.path)) as temporary:
            written, synced = _write(temporary.path / "file", size)
            read = _read(temporary.path / "file")
    except OSError as error:
        return [
            Finding(
                "red", "disk", f"{asked.path} cannot be written: {error}", f"mkdir -p {asked.path} && ls -ld {asked.path}  # or give another --path"
            )
        ]
    slow = min(written, read) < SLOW_MB_PER_SECOND
    detail = f"{written:.0f} MB/s written (fsync took {synced:.2f} s), {read:.0f} MB/s read, of {size / MB:.0f} MB in {asked.path}"
    return [Finding("yellow" if slow else "green", "disk", detail, "put outputs on a faster disk: --path DIR says which is" if slow else "")]


def _write(path: Path, size: int) -> tuple[float, float]:
    """MB/s of writing with fsync, and the seconds of the fsync."""
    start = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(max(1, size // len(CHUNK))):
            file.write(CHUNK)
        file.flush()
        before = time.perf_counter()
        os.fsync(file.fileno())
        end = time.perf_counter()
    return path.stat().st_size / MB / (end - start), end - before


def _read(path: Path) -> float:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        while file.read(1 << 20):
            pass
        return path.stat().st_size / MB / (time.perf_counter() - start)


def semantics(asked: Asked) -> list[Finding]:
    """What other processes see of our renames, maps and locks, and how far the folder's clock is from ours."""
    trials: dict[str, tuple[Callable[[Path], str | None], str]] = {
        "atomic rename": (_renames, "checkpoints and marks could be read half-written"),
        "fsync": (_syncs, "a power cut could lose a finished checkpoint"),
        "mapped files": (_maps, "shards could be read stale"),
        "file locks": (_locks, "two processes could take one cache"),
    }
    found = []
    try:
        with TemporaryFolder("doctor", Path(asked.path)) as temporary:
            for name, (trial, means) in trials.items():
                wrong = trial(temporary.path)
                fix = f"choose another folder than {asked.path}: a local disk, NFS 4, Lustre (mounted with flock) or GPFS"
                found.append(
                    Finding("red", name, f"{wrong}: {means}", fix) if wrong else Finding("green", name, "as it should be, from two processes")
                )
            found.append(_clock(temporary.path))
    except OSError as error:
        return [*found, Finding("red", "folder", f"{asked.path}: {error}", f"mkdir -p {asked.path} && ls -ld {asked.path}  # or give another --path")]
    return found


def _partner(code: str, path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-I", "-c", code, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _outcome(partner: subprocess.Popen[str]) -> int:
    try:
        partner.communicate(timeout=PARTNER_SECONDS)
    finally:
        partner.kill()
    return partner.returncode


def _renames(path: Path) -> str | None:
    """A reader in another process sees whole files alone while we replace one again and again."""
    file = path / "renamed"
    file.write_bytes(b"a" * 4096)
    partner = _partner(READ_ALWAYS_WHOLE, file)
    assert partner.stdout is not None
    partner.stdout.readline()
    for count in range(1_000_000):
        if partner.poll() is not None:
            break
        temporary = temporary_of(file)
        temporary.write_bytes(bytes([97 + count % 26]) * 4096)
        temporary.replace(file)
    return "a reader met a part of a file, or none, while it was replaced" if _outcome(partner) else None


def _syncs(path: Path) -> str | None:
    try:
        write_atomic(path / "synced", b"content")
        sync_folder(path)
    except OSError as error:
        return f"fsync failed ({error})"
    return None


def _maps(path: Path) -> str | None:
    file = path / "mapped"
    file.write_bytes(b"old!")
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 4) as mapped:
        mapped[:4] = b"new!"
        mapped.flush()
        return "another process does not see what a map wrote" if _outcome(_partner(READ_MAPPED, file)) else None


def _locks(path: Path) -> str | None:
    file = path / "locked"
    file.touch()
    with file.open() as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        return None if _outcome(_partner(TAKE_LOCK, file)) == 3 else "another process took a lock that we hold"


def _clock(path: Path) -> Finding:
    """The folder's server stamps a new file; between two looks at our own clock it must lie."""
    before = time.time()
    (path / "stamped").write_bytes(b"x")
    after = time.time()
    stamp = (path / "stamped").stat().st_mtime
    skew = max(before - stamp, stamp - after, 0.0)
    fix = "chronyc makestep  # or systemctl restart systemd-timesyncd, on the machine whose clock is wrong"
    detail = f"{skew:.3f} s between this machine and the folder's server"
    return Finding("yellow" if skew > SKEW_SECONDS else "green", "clock of the folder", detail, fix if skew > SKEW_SECONDS else "")
