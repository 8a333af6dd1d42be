"""Context parallelism over NCCL: two GPUs give the curve of one, packed or not, dense and hybrid, with each exchange that TransformerEngine has.

    pytest -m gpu tests/gpu/test_gpu_context_parallel.py -s      (prints every difference, and that of dp=2 for scale)

fp32 with our layers (TF32 off; a hybrid's scan multiplies in TF32) is held to fp32 rounding, TransformerEngine in bf16 to the bounds of
test_gpu_training: (first step, every step), of which the first has seen no update and is the proof; later ones amplify rounding.
`python tests/gpu/test_gpu_context_parallel.py` runs the fp32 cases on two CPU processes.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY
from training import TINY_LLAMA, VOCAB_SIZE, largest_difference, run_cases

gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(gpus < 2, reason="needs two CUDA devices")]

MODELS: dict[str, dict[str, Any]] = {
    "llama": {**TINY_LLAMA, "hidden_size": 128, "intermediate_size": 256, "head_dim": 32},
    "mistral": {**TINY["mistral"], "sliding_window": 40},
    "granite_hybrid": TINY["granite_hybrid_rope"],
    "nemotron_h": TINY["nemotron_h"],
}
"""mistral's window is longer than a chunk of 32 tokens"""
COMMON: dict[str, Any] = {
    "data__seq_len": 128,
    "steps": 4,
    "global_batch": 4,
    "optimizer__lr": 1e-3,
    "optimizer__eps": 1e-2,
    "validation__interval": 4,
    "validation__batches": 1,
}
PACKED = {"data.packing.pad_multiple": 8, "data.packing.over_length": "split", "data.packing.window_documents": 20}
LOCAL = {"layers": "local", "precision": "fp32"}
ENGINE = {"layers": "transformer_engine", "precision": "bf16"}
FP8 = {**ENGINE, "fp8.recipe": "tensorwise"}
CP = {"parallel.cp": 2}


def exchange(kind: str) -> dict[str, Any]:
    return {**CP, "parallel.cp_comm_type": kind}


FP32: dict[str, dict[str, Any]] = {f"{name}{packed}": CP for name in MODELS for packed in ("", " packed")}
BF16: dict[str, dict[str, Any]] = {
    **{f"llama {kind}": exchange(kind) for kind in ("p2p", "a2a", "all_gather")},
    "llama default recompute": {**CP, "recompute": "full"},
    "mistral default": CP,
    "mistral all_gather": exchange("all_gather"),
    **{f"{name} {kind}": exchange(kind) for name in ("granite_hybrid", "nemotron_h") for kind in ("p2p", "a2a", "all_gather")},
    "nemotron_h default recompute": {**CP, "recompute": "full"},
}
BF16_PACKED: dict[str, dict[str, Any]] = {
    **{f"llama packed {kind}": exchange(kind) for kind in ("p2p", "a2a")},
    "mistral packed default": CP,
    **{f"{name} packed {kind}": exchange(kind) for name in ("granite_hybrid", "nemotron_h") for kind in ("p2p", "a2a")},
}
"""case -> layout; a case's first words name what it must equal on one GPU"""
FP32_BOUNDS, TF32_BOUNDS, BF16_BOUNDS, FP8_BOUNDS = (1e-6, 1e-5), (1e-5, 1e-4), (2e-3, 1e-2), (1e-2, 5e-2)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each model, from random weights."""
    return write_starts(tmp_path_factory.mktemp("gpu_context_parallel"), "cuda")


def write_starts(root: Path, device: str) -> Path:
    starts = {}
    for name, config in MODELS.items():
        folder = root / f"model_{name}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**config, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 128}))
        (folder / "tokenizer.json").write_text("{}")
        starts[name] = {"set": {"model.hf_config": str(folder), "model.tokenizer": str(folder), **LOCAL}}
    run_cases(root, 1, starts, folder=root / "starts", **{**COMMON, "device": device, "steps": 1})
    return root


def sets(root: Path, cases: dict[str, dict[str, Any]], kind: dict[str, Any]) -> dict[str, dict[str, Any]]:
    def one(case: str) -> dict[str, Any]:
        return {"model.checkpoint": str(root / "starts" / case.split()[0]), **(PACKED if "packed" in case else {})}

    return {case: {"set": {**one(case), **kind, **layout}} for case, layout in cases.items()}


def alone(case: str) -> str:
    """What a case must equal on one rank."""
    return " ".join(word for word in case.split() if word == "packed" or word in MODELS)


def differences(root: Path, cases: dict[str, dict[str, Any]], kind: dict[str, Any], ranks: int = 2, device: str = "cuda") -> dict[str, Any]:
    """Of each case from one rank: loss and gradient norm, (first step, worst step); and of dp=2, whose sums differ in order alone."""
    settings = {**COMMON, "device": device}
    wanted = {alone(case): {} for case in cases}
    expected = run_cases(root, 1, sets(root, wanted, kind), **settings)
    found = run_cases(root, ranks, sets(root, {**cases, **{f"{case} dp": {} for case in wanted}}, kind), **settings)
    pairs = {case: (lines, expected[alone(case)]) for case, lines in found.items()}
    result = {case: (largest_difference(lines[:1], one[:1]), largest_difference(lines, one)) for case, (lines, one) in pairs.items()}
    print(*(f"{case:40s} first {first:.1e} worst {worst:.1e}" for case, (first, worst) in result.items()), sep="\n", flush=True)
    return {case: value for case, value in result.items() if not case.endswith(" dp")}


def too_large(found: dict[str, tuple[float, float]], bounds: tuple[float, float]) -> dict[str, tuple[float, float]]:
    return {case: value for case, value in found.items() if not (value[0] < bounds[0] and value[1] < bounds[1])}


def check_fp32(root: Path, device: str) -> None:
    found = differences(root, FP32, LOCAL, device=device)
    hybrid = {case: value for case, value in found.items() if case.startswith(("granite_hybrid", "nemotron_h"))}
    assert too_large(hybrid, TF32_BOUNDS) == {}
    assert too_large({case: value for case, value in found.items() if case not in hybrid}, FP32_BOUNDS) == {}


def test_our_layers_in_fp32_give_the_curve_of_one_gpu(root):
    check_fp32(root, "cuda")


def test_every_exchange_of_transformer_engine_gives_the_curve_of_one_gpu(root):
    assert too_large(differences(root, BF16, ENGINE), BF16_BOUNDS) == {}


def test_packed_documents_go_through_transformer_engine(root):
    assert too_large(differences(root, BF16_PACKED, ENGINE), BF16_BOUNDS) == {}


def test_fp8_beside_context_parallelism(root):
    assert too_large(differences(root, {"llama": CP, "llama packed": CP}, FP8), FP8_BOUNDS) == {}


@pytest.mark.skipif(gpus < 4, reason="needs four CUDA devices")
def test_two_levels_and_tensor_parallelism_beside(root):
    levels = {"parallel.cp": 4, "parallel.cp_comm_type": "a2a+p2p", "parallel.hierarchical_context_parallel_sizes": "[2, 2]"}
    beside = {**CP, "parallel.tp": 2, "parallel.sp": "true"}
    cases = {"llama levels": levels, "nemotron_h levels": levels, "llama tp": beside, "nemotron_h tp": beside, "granite_hybrid packed tp": beside}
    assert too_large(differences(root, cases, ENGINE, ranks=4), BF16_BOUNDS) == {}


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        check_fp32(write_starts(Path(place), "cpu"), "cpu")
