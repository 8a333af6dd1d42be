"""The process of one check: `python -m megatron_prism.doctor.worker NAME JSON`. Its last line of output is the list of findings."""

import contextlib
import json
import os
import sys
from dataclasses import asdict

from megatron_prism.doctor import Asked, Finding, checks, compute, folder
from megatron_prism.errors import UserError

FUNCTIONS = {
    "software": checks.software,
    "gpu": checks.gpu,
    "gpu-packages": checks.gpu_packages,
    "vllm": checks.vllm,
    "patches": checks.patches,
    "limits": checks.limits,
    "disk": folder.disk,
    "folder": folder.semantics,
    "ranks": compute.ranks,
    "step": compute.step,
}


def main() -> None:
    """Run the check, with what libraries print sent to stderr."""
    name, asked = sys.argv[1], Asked(**{"path": ".", **json.loads(sys.argv[2])})
    answer = os.dup(1)
    os.dup2(2, 1)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            found = FUNCTIONS[name](asked)
        except UserError as error:
            found = [Finding("red", name, str(error), f"prism doctor --only {name} --device cpu  # the same without a GPU")]
    os.write(answer, (json.dumps([asdict(finding) for finding in found]) + "\n").encode())


if __name__ == "__main__":
    main()
