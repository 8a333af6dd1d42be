"""Laws 3, 4 and 8 on packed documents: every layout gives the curve of one rank, a resumed run is the unbroken one bit for bit, and a run that
forgets where documents end is seen. fp32, a few steps from one checkpoint.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from tiny_blend import write_tiny_blend
from tiny_models import write_tiny
from training import VOCAB_SIZE, differing, final_state, largest_difference, metrics, recipe, run_cases

from megatron_prism.config import load_recipe
from megatron_prism.engine import checkpoint, loop, parallel, run_folder
from megatron_prism.engine.packed_data import PackedBatch
from megatron_prism.engine.recipe import TrainConfig
from megatron_prism.stages import convert

BOUND = 1e-5
MODELS = ("llama", "granite_hybrid_rope")
STEPS, HALF = 4, 2
SETTINGS: dict[str, Any] = {
    "steps": STEPS,
    "global_batch": 4,
    "optimizer__lr": 1e-3,
    "checkpoint__save_interval": HALF,
    "checkpoint__keep_last": None,
    "data__packing__pad_multiple": 4,
    "data__packing__over_length": "split",
    "data__packing__overlap": 1,
    "data__packing__window_documents": 20,
}
SP = {"parallel.tp": 2, "parallel.sp": "true"}
CASES = {
    "llama tp_sp recompute": {**SP, "recompute": "full"},
    "llama pp": {"parallel.pp": 2},
    "llama dp": {},
    "granite_hybrid_rope tp_sp": SP,
    "granite_hybrid_rope pp": {"parallel.pp": 2},
}
"""model and layout on two ranks"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("packed_training")
    write_tiny_blend(root / "data", VOCAB_SIZE)
    for name in MODELS:
        write_tiny(name, root / name / "hf", vocab_size=VOCAB_SIZE)
        convert.run(convert.Config(direction="import", source=root / name / "hf", output=root / name / "checkpoint"))
    yield root
    parallel.stop()


def train(root: Path, name: str, run: str, **settings: Any) -> Path:
    """On one rank, in this process."""
    start = {"model__checkpoint": str(root / name / "checkpoint")}
    return loop.train(load_recipe(None, recipe(root, root / name / run, **start, **{**SETTINGS, **settings}), TrainConfig))


@pytest.fixture(scope="module")
def one_rank(root: Path) -> dict[str, Path]:
    return {name: train(root, name, "one_rank") for name in MODELS}


def test_a_resumed_run_equals_an_unbroken_run_in_the_middle_of_an_epoch(root, one_rank):
    for name, run in one_rank.items():
        resumed = root / name / "resumed"
        shutil.copytree(run, resumed)
        (resumed / "COMPLETE").unlink()
        checkpoint.remove(run_folder.step_folder(resumed, STEPS))
        train(root, name, "resumed")
        assert [line["loss"] for line in metrics(resumed)] == [line["loss"] for line in metrics(run)]
        assert differing(final_state(resumed), final_state(run)) == [], name


def test_forgotten_boundaries_change_the_curve(root, one_rank):
    with mock.patch.object(PackedBatch, "packed_seq_params", None):
        faulty = train(root, "llama", "faulty", checkpoint__save_interval=None)
    assert largest_difference(metrics(faulty), metrics(one_rank["llama"])) > 100 * BOUND


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_layout_gives_the_curve_of_one_rank(root, one_rank):
    cases = {case: {"set": {**settings, "model.checkpoint": str(root / case.split()[0] / "checkpoint")}} for case, settings in CASES.items()}
    found = run_cases(root, 2, cases, timeout=280, **{**SETTINGS, "checkpoint__save_interval": None})
    differences = {case: largest_difference(lines, metrics(one_rank[case.split()[0]])) for case, lines in found.items()}
    assert max(differences.values()) < BOUND, differences
