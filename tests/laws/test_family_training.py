"""Laws 3 and 4 for a dense Granite and both hybrids: every layout gives the curve of one rank, and a resumed run is the unbroken one bit for bit.

fp32, 5 steps from one checkpoint, the same bound as LLaMA's (see test_same_loss).
"""

import shutil
from pathlib import Path

import pytest
from tiny_blend import write_tiny_blend
from tiny_models import write_tiny
from training import VOCAB_SIZE, differing, final_state, largest_difference, run_cases

from megatron_prism.engine import checkpoint, run_folder
from megatron_prism.stages import convert

BOUND = 1e-5
MODELS = ("granite_tp4", "granite_hybrid_one_group_tp4", "nemotron_h_tp4")
TP = {"parallel.tp": 2}
SP = {"parallel.tp": 2, "parallel.sp": "true"}
PP = {"parallel.pp": 2}
UNEVEN = {**PP, "parallel.num_layers_in_first_pipeline_stage": 3}
LAYOUTS = {
    2: {
        "tp": (MODELS[1:], TP),
        "tp_sp": (MODELS, SP),
        "pp": (MODELS, PP),
        "uneven": (MODELS[1:], UNEVEN),  # a pipeline may be cut anywhere in the pattern: 3 layers and 5
        "dp": (MODELS, {}),
    },
    4: {
        "tp_sp_pp": (MODELS, {**SP, **PP}),
        "tp_sp_dp": (MODELS[1:], SP),
        "pp_dp": (MODELS[1:], PP),
    },
}
"""ranks -> layout -> the models that try it, and its settings"""
SETTINGS = {"optimizer__lr": 1e-3}
RESUMED = {"tp_sp": {**SP, "hidden_dropout": 0.1}, "bf16 pp": {**PP, "precision": "bf16"}}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("family_training")
    write_tiny_blend(root / "data", VOCAB_SIZE)
    for name in MODELS:
        write_tiny(name, root / name / "hf")
        convert.run(convert.Config(direction="import", source=root / name / "hf", output=root / name / "checkpoint"))
    return root


@pytest.fixture(scope="module")
def one_rank(root: Path) -> dict[str, list[dict[str, float]]]:
    return run_cases(root, 1, {name: {"set": start(root, name)} for name in MODELS}, **SETTINGS)


def start(root: Path, name: str) -> dict[str, str]:
    return {"model.checkpoint": str(root / name / "checkpoint")}


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_every_layout_of_every_kind_of_model_gives_the_curve_of_one_rank(root, one_rank, ranks):
    cases = {f"{name} {layout}": {"set": {**settings, **start(root, name)}} for layout, (names, settings) in LAYOUTS[ranks].items() for name in names}
    found = run_cases(root, ranks, cases, timeout=1400, **SETTINGS)
    differences = {case: largest_difference(lines, one_rank[case.split()[0]]) for case, lines in found.items()}
    print(differences)
    assert max(differences.values()) < BOUND, differences


def test_hybrids_resume_bit_for_bit(root):
    saving = {"steps": 4, "checkpoint__save_interval": 2, "checkpoint__keep_last": 10, **SETTINGS}
    cases = {f"{name} {layout}": {"set": {**settings, **start(root, name)}} for layout, settings in RESUMED.items() for name in MODELS[1:]}
    run_cases(root, 2, cases, folder=root / "unbroken", timeout=700, **saving)
    for case in cases:
        shutil.copytree(root / "unbroken" / case, root / "resumed" / case)
        (root / "resumed" / case / "COMPLETE").unlink()
        checkpoint.remove(run_folder.step_folder(root / "resumed" / case, 4))
    run_cases(root, 2, cases, folder=root / "resumed", timeout=700, **saving)
    for case in cases:
        assert differing(final_state(root / "resumed" / case), final_state(root / "unbroken" / case)) == [], case
