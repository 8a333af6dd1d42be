"""The real `prism` command in tests, as a process of its own."""

import os
import subprocess
import sys
from pathlib import Path


def prism(*words: object, timeout: float = 120, cwd: Path | None = None, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`prism WORDS ...` with its output captured."""
    ours = {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "megatron_prism", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=cwd, env={**os.environ, **ours, **(env or {})}, check=False)
