"""Training attention alone is one computation at every layout: dp, tp with sp, pp with a tied embedding, a pipeline stage that has no attention."""

from pathlib import Path

import pytest
from tiny_models import write_tiny
from training import largest_difference, metrics, recipe, run_cases

from megatron_prism.config import load_recipe, validate
from megatron_prism.engine import loop, parallel
from megatron_prism.engine.recipe import TrainConfig
from megatron_prism.stages import convert

LAYOUTS = {
    "dp": {},
    "overlap, as on CUDA": {},
    "tp_sp": {"parallel.tp": 2, "parallel.sp": "true"},
    "pp": {"parallel.pp": 2, "recompute": "full"},
}
MODELS = ("llama_tp4", "granite_hybrid")
SETTINGS = {"trainable": "attention", "steps": 3}


@pytest.mark.slow
def test_the_curve_is_that_of_one_rank(tmp_path: Path) -> None:
    alone, cases = {}, {}
    for name in MODELS:
        source, start = write_tiny(name, tmp_path / f"{name}_hf"), tmp_path / name
        convert.run(validate({"direction": "import", "source": str(source), "output": str(start)}, convert.Config, "test"))
        words = recipe(tmp_path, tmp_path / f"{name}_one", model__checkpoint=str(start), **SETTINGS)
        alone[name] = metrics(loop.train(load_recipe(None, words, TrainConfig)))
        for layout, keys in LAYOUTS.items():
            fault = "overlap" if layout.startswith("overlap") else None
            cases[f"{name} {layout}"] = {"set": {"model.checkpoint": start, **keys}, "fault": fault}
    parallel.stop()
    for case, found in run_cases(tmp_path, 2, cases, **SETTINGS).items():
        assert largest_difference(found, alone[case.split()[0]]) < 1e-5, case
