"""What two GPUs would show, on one: two ranks share it and exchange through host memory over gloo; tests/shared_gpu.py says what that leaves out.

    pytest -m gpu tests/gpu/test_gpu_shared.py -s

Hybrids and context parallelism give the curve of one rank; two data-parallel ranks in deterministic mode go on after a restart bit for bit.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gpu_training import ON_GPU, SHAPE, from_hybrid
from training import differing, final_state, from_random, largest_difference, run_cases

from megatron_prism.engine import checkpoint, run_folder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHARED = Path(__file__).parents[1] / "laws" / "shared_gpu_runs.py"
TE = {"layers": "transformer_engine", "precision": "bf16"}
TP = {"parallel.tp": 2, "parallel.sp": "true"}
CURVES: dict[str, tuple[str, dict[str, Any], dict[str, Any], tuple[float, float]]] = {
    "hybrid fp32 tp=2": ("hybrid", {}, TP, (1e-5, 1e-4)),
    "hybrid bf16 tp=2": ("hybrid", TE, TP, (2e-3, 1e-2)),
    "hybrid bf16 cp=2": ("hybrid", TE, {"parallel.cp": 2}, (2e-3, 1e-2)),
    "dense fp32 tp=2": ("dense", {}, TP, (1e-6, 1e-5)),
    "dense bf16 cp=2": ("dense", TE, {"parallel.cp": 2}, (2e-3, 1e-2)),
}
"""start, settings, layout, and test_gpu_training's bounds of loss and gradient norm: first step, every step (a hybrid's scan multiplies in TF32)"""
SAVED = {**TE, "deterministic": "true", "steps": 6, "checkpoint.save_interval": 3, "checkpoint.keep_last": 10}
EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "dp=2": ("dense", {}),
    "dp=2 FP8 tensorwise": ("dense", {"fp8.recipe": "tensorwise"}),
    "hybrid tp=2": ("hybrid", TP),
}


@pytest.fixture(scope="module")
def alone_and_shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A folder, the curves of one rank, and those of two ranks on its GPU; runs of EXACT are there whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAMBA_DETERMINISTIC", "1")  # one of each kernel's configurations: trying them all takes minutes
        patch.setenv("TRITON_CACHE_AUTOTUNING", "0")
        root = tmp_path_factory.mktemp("shared")
        fresh = {"dense": from_random(root, **SHAPE), "hybrid": from_hybrid(root)}
        cases = {f"start_{name}": {"set": {**where, "steps": 1}} for name, where in fresh.items()}
        for name, (start, settings, _, _) in CURVES.items():
            cases[name] = {"set": {**begin(root, start), **settings}}
        alone = run_cases(root, 1, cases, folder=root / "alone", **ON_GPU)
        cases = {name: {"set": {**begin(root, start), **settings, **layout}} for name, (start, settings, layout, _) in CURVES.items()}
        shared = run_cases(root, 2, cases | exact_cases(root), folder=root / "shared", script=SHARED, **ON_GPU)
    return root, alone, shared


def begin(root: Path, start: str) -> dict[str, str]:
    """A run from a start's weights."""
    return {"model.checkpoint": str(root / "alone" / f"start_{start}")}


def exact_cases(root: Path) -> dict[str, dict[str, Any]]:
    return {name: {"set": {**begin(root, start), **SAVED, **settings}} for name, (start, settings) in EXACT.items()}


@pytest.fixture(scope="module")
def resumed(alone_and_shared) -> Path:
    """The runs of EXACT, gone on with from their third step by other processes."""
    root, _, _ = alone_and_shared
    (root / "resumed").mkdir()
    for name in EXACT:
        run = root / "resumed" / name
        shutil.copytree(root / "shared" / name, run)
        (run / "COMPLETE").unlink()
        checkpoint.remove(run_folder.step_folder(run, 6))
    run_cases(root, 2, exact_cases(root), folder=root / "resumed", script=SHARED, **ON_GPU)
    return root


@pytest.mark.parametrize("name", CURVES)
def test_two_ranks_on_one_gpu_give_the_curve_of_one(alone_and_shared, name):
    _, alone, shared = alone_and_shared
    first, worst = largest_difference(shared[name][:1], alone[name][:1]), largest_difference(shared[name], alone[name])
    print(f"{name}: first step {first:.1e}, worst {worst:.1e}", flush=True)
    bounds = CURVES[name][3]
    assert first < bounds[0] and worst < bounds[1]


@pytest.mark.parametrize("name", EXACT)
def test_a_resumed_run_of_two_ranks_equals_an_unbroken_run(resumed, name):
    assert differing(final_state(resumed / "resumed" / name), final_state(resumed / "shared" / name)) == []
