"""Every tiny family on one GPU, with TransformerEngine's layers and the fused kernels, against transformers in fp32 on the CPU.

fp32 with our own layers (and mamba-ssm's scan) is held near fp32 rounding; bf16 with TransformerEngine to what 8 bits give.
"""

from pathlib import Path

import pytest
import torch
from family_steps import NOTHING_MOVES, gradients, reference, write_all
from tiny_models import TINY
from training import metrics, run_cases

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"), pytest.mark.timeout(900)]

KINDS = {
    "fp32": {"layers": "local", "precision": "fp32"},
    "bf16": {"layers": "transformer_engine", "precision": "bf16"},
}
BOUNDS = {"fp32": (1e-5, 2e-3), "bf16": (1e-2, 1e-1)}
"""loss (relative), gradient of one weight (relative, Frobenius norm)"""


def test_loss_and_gradients_are_those_of_transformers_with_fused_kernels(tmp_path: Path):
    root = write_all(tmp_path)
    cases = {f"{name} {kind}": {"set": {**KINDS[kind], "model.checkpoint": str(root / name / "checkpoint")}} for name in TINY for kind in KINDS}
    run_cases(root, 1, cases, folder=root / "runs", timeout=800, device="cuda", **NOTHING_MOVES)
    found = {}
    for name in TINY:
        loss, expected = reference(root / name / "hf", root / "data")
        floor = 1e-3 * max(wanted.norm() for wanted in expected.values())
        for kind in KINDS:
            run = root / "runs" / f"{name} {kind}"
            ours = gradients(run)
            errors = {weight: ((ours[weight] - wanted).norm() / wanted.norm().clamp(min=floor)).item() for weight, wanted in expected.items()}
            worst = max(errors, key=lambda weight: errors[weight])
            found[f"{name} {kind}"] = (abs(metrics(run)[0]["loss"] / loss - 1), errors[worst], worst)
    for case, (loss_error, gradient_error, worst) in found.items():
        print(f"{case}: loss {loss_error:.1e}, gradients {gradient_error:.1e} ({worst})")
    wrong = {
        case: values for case, values in found.items() if not (values[0] < BOUNDS[case.split()[1]][0] and values[1] < BOUNDS[case.split()[1]][1])
    }
    assert wrong == {}
