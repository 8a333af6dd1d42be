"""Law 3 for hidden states: under every layout they are those of one rank, at every layer; law 8: faults are seen."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from laws.hidden_state_ranks import run_case
from multirank import run_ranks
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny

from megatron_prism import artifact
from megatron_prism.config import load_recipe, to_toml, validate
from megatron_prism.stages import cka

BOUND = 1e-5
"""relative to a layer's largest value; fp32 sums in another order"""
SCRIPT = Path(__file__).with_name("hidden_state_ranks.py")
MODELS = ("llama", "granite_hybrid_rope", "nemotron_h")
TP, SP, PP = {"tp": 2}, {"tp": 2, "sp": True}, {"pp": 2}
CASES: dict[str, dict[str, Any]] = {
    "llama tp": TP,
    "llama tp_sp": SP,
    "llama pp": PP,
    "llama dp": {},
    "granite_hybrid_rope tp_sp": SP,
    "nemotron_h tp": TP,
    "nemotron_h pp": {**PP, "num_layers_in_first_pipeline_stage": 3},
}
FAULTS = {"parts_begin_at_0": SP, "first_rows_everywhere": TP}


LAYOUTS: dict[str, dict[str, Any]] = {"tp_sp": SP, "pp": PP, "dp": {}}


def write_recipe(root: Path, name: str, layout: dict[str, Any], other: str = "llama_other") -> str:
    """A CKA of one model and its like, on the words that both know."""
    models = [{"name": model, "path": str(root / model)} for model in ("llama", other)]
    sets = [{"name": "words", "files": [str(root / "words.txt")]}]
    asked = {
        "models": models,
        "sets": sets,
        "inputs": 12,
        "max_tokens": 32,
        "bootstrap": {"size": 6, "draws": 3},
        "parallel": layout,
        "device": "cpu",
    }
    (root / f"{name}.toml").write_text(to_toml(validate({**asked, "output": str(root / name)}, cka.Config, "test")))
    return str(root / f"{name}.toml")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """The models; states of every case and fault on two ranks beside them."""
    root = tmp_path_factory.mktemp("states")
    for name in MODELS:
        write_tiny(name, root / name)
    write_tiny("llama", root / "llama_other", seed=1)
    weights = write_tiny("llama", root / "broken") / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"].fill_(math.inf)
    save_file(tensors, weights, metadata={"format": "pt"})
    (root / "words.txt").write_text("\n\n".join(" ".join(f"w{3 + (7 * text + word) % 90}" for word in range(3 + text)) for text in range(14)))
    cases = {name: {"layout": layout} for name, layout in CASES.items()}
    cases |= {f"llama {fault}": {"layout": layout, "fault": fault} for fault, layout in FAULTS.items()}
    recipes = [write_recipe(root, name, layout) for name, layout in LAYOUTS.items()]
    refused = write_recipe(root, "refused", {}, other="broken")
    (root / "cases.json").write_text(json.dumps({"root": str(root), "output": str(root), "cases": cases, "recipes": recipes, "refused": refused}))
    run_ranks(SCRIPT, 2, str(root / "cases.json"))
    return root


@pytest.fixture(scope="module")
def alone(folders, leave_groups) -> dict[str, Any]:
    """The states of each model on one rank."""
    found = {name: run_case(folders / name, {}) for name in MODELS}
    return {name: states.numpy() for name, states in found.items() if states is not None}


def largest_difference(folders: Path, case: str, alone: dict[str, Any]) -> float:
    """Over all layers, each relative to its largest value."""
    found, expected = np.load(folders / f"{case}.npy"), alone[case.split()[0]]
    assert found.shape == expected.shape
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_states_are_those_of_one_rank(folders, alone, case):
    assert largest_difference(folders, case, alone) <= BOUND


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_figures_of_a_comparison_are_those_of_one_rank(folders, layout):
    alone = json.loads((cka.run(load_recipe(Path(write_recipe(folders, "alone", {})), [], cka.Config)) / "cka.json").read_text())
    found = json.loads((folders / layout / "cka.json").read_text())
    artifact.require(folders / layout, "cka")
    points, expected = (result["pairs"][0]["sets"][0]["points"] for result in (found, alone))
    for key in ("cka", "mean", "low", "shuffled"):
        assert [point[key] for point in points] == pytest.approx([point[key] for point in expected], rel=1e-4)
    assert found["sets"] == alone["sets"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(folders, alone, fault):
    assert largest_difference(folders, f"llama {fault}", alone) > 100 * BOUND


def test_every_rank_hears_why_a_comparison_was_refused(folders):
    """Rank 0 looks at the states; one that did not hear would wait, and die of the others' end with a stack trace."""
    told = [(folders / f"refused.{rank}.txt").read_text() for rank in range(2)]
    assert told[0] == told[1] and "its weight model.norm.weight holds NaN or infinite values" in told[0]
    assert not artifact.is_complete(folders / "refused")
