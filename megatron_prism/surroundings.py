"""What made an artifact, for its provenance: the commit of our source, the versions of packages, the machine. No torch; nothing of it is refused."""

import os
import platform
import shutil
import socket
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

RECORDED_PACKAGES = (
    *("torch", "megatron-core", "transformer-engine", "flash-attn-4", "mamba-ssm", "causal-conv1d"),
    *("transformers", "tokenizers", "safetensors", "numpy", "pydantic"),
)
NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")


def git_commit() -> str | None:
    """The commit of the installed source tree, with `+changes` when files differ from it; None outside git."""
    git, here = shutil.which("git"), Path(__file__).resolve()
    if git is None:
        return None
    # An installed copy may lie inside some other project's repository: that commit says nothing about this code.
    tracked = subprocess.run([git, "-C", str(here.parent), "ls-files", "--error-unmatch", here.name], capture_output=True, check=False)
    if tracked.returncode:
        return None
    command = [git, "-C", str(here.parent), "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def host_shape() -> dict[str, Any]:
    """What the work ran on: name, cores, memory in GiB, GPU models, ranks."""
    gpus = [line.partition(":")[2].strip() for file in sorted(NVIDIA_GPUS.glob("*/information")) for line in file.read_text().splitlines()[:1]]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "name": socket.gethostname(),
        "cpus": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "gpus": gpus,
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
        "system": platform.platform(),
    }


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that decide results."""
    versions = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
