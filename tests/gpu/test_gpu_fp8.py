"""FP8 training follows bf16 training as closely as two bf16 runs with another data order follow each other; a fault in the scales does not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "fp8_convergence.py"
FAULT = "delayed, scales 16 times too large"


@pytest.mark.timeout(1800)
def test_fp8_follows_bf16_and_a_scaling_fault_does_not(tmp_path):
    done = subprocess.run([sys.executable, str(SCRIPT), "--work", str(tmp_path / "work")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    found = json.loads((tmp_path / "work" / "gaps.json").read_text())
    for model, values in found.items():
        allowed = abs(values["bf16, other order - bf16"])
        for recipe in ("tensorwise", "delayed", "blockwise"):
            assert abs(values[f"{recipe} - bf16"]) <= allowed, (model, recipe, values)
    assert abs(found["dense"][f"{FAULT} - bf16"]) > abs(found["dense"]["bf16, other order - bf16"]), found
