"""Laws 1, 2 and 3 for every family: logits, loss and each weight's gradient are those of transformers, at every layout, and every bit comes back.

One training step is taken at a learning rate of 1e-30 (see `family_steps`): the export at its end must equal the folder of the beginning.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from family_steps import NOTHING_MOVES, gradients, reference, write_all
from safetensors.torch import load_file
from tiny_models import TINY
from training import metrics, run_cases

from megatron_prism.engine import verify, weights

GRADIENT_BOUND = 1e-4
"""largest difference over largest value of one weight's gradient, fp32; measured up to 1e-5"""
BASE = [name for name in TINY if "tp4" not in name]
HYBRID = [name for name in BASE if name.startswith(("granite_hybrid", "nemotron_h"))]
FOUR = [name for name in TINY if "tp4" in name]
TP, SP, PP, CP = {"parallel.tp": 2}, {"parallel.tp": 2, "parallel.sp": "true"}, {"parallel.pp": 2}, {"parallel.cp": 2}
LAYOUTS: dict[int, dict[str, tuple[list[str], dict[str, Any]]]] = {
    1: {"one": (list(TINY), {})},
    2: {"tp": (HYBRID, TP), "tp_sp": (BASE, SP), "pp": (BASE, PP), "cp": (["mistral", *HYBRID], CP)},
    4: {"tp_sp": (FOUR, {"parallel.tp": 4, "parallel.sp": "true"}), "pp": (HYBRID, {"parallel.pp": 4}), "tp_sp_pp": (HYBRID, {**SP, **PP})},
}
"""ranks -> layout -> the models that try it, and its settings"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("name", TINY)
def test_logits_are_those_of_transformers(root, name):
    found = verify.verify(root / name / "checkpoint", root / name / "hf")
    assert 0 <= found.relative < 2e-5, found


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("ranks", LAYOUTS)
def test_loss_gradients_and_weights_are_those_of_transformers_at_every_layout(root, ranks):
    cases = {
        f"{name} {layout}": {"set": {**settings, "model.checkpoint": str(root / name / "checkpoint")}}
        for layout, (names, settings) in LAYOUTS[ranks].items()
        for name in names
    }
    folder = root / f"ranks_{ranks}"
    run_cases(root, ranks, cases, folder=folder, timeout=1400, **NOTHING_MOVES)
    wrong = {}
    for name in sorted({case.split()[0] for case in cases}):
        loss, expected = reference(root / name / "hf", root / "data")
        for case in (case for case in cases if case.split()[0] == name):
            wrong[case] = differences(folder / case, loss, expected)
            assert same_tensors(root / name / "hf", weights.export_hf(folder / case, root / f"back_{ranks}_{case}"))
    print({case: max(found.items(), key=lambda item: item[1]) for case, found in wrong.items()})
    assert {case: found for case, found in wrong.items() if max(found.values()) > GRADIENT_BOUND} == {}


def differences(run: Path, loss: float, expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative differences of the loss and of each weight's gradient."""
    found = gradients(run)
    assert found.keys() == expected.keys()
    (line,) = metrics(run)
    # a key's bias shifts all scores of a query alike where there is no RoPE: its gradient is zero but for rounding, and is held to the others' size
    floor = 1e-2 * max(wanted.abs().max() for wanted in expected.values())
    relative = {name: ((found[name] - wanted).abs().max() / wanted.abs().max().clamp(min=floor)).item() for name, wanted in expected.items()}
    return {"loss": abs(line["loss"] / loss - 1), **relative}


def same_tensors(source: Path, back: Path) -> bool:
    wanted, found = (load_file(folder / "model.safetensors") for folder in (source, back))
    return wanted.keys() == found.keys() and all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
