"""Started on two ranks by test_bad_steps_ranks: one run after another, each with a NaN planted on one rank, and what each rank was told.

bad_step_ranks.py COMMON.json OUT: the overrides that all runs share; OUT/CASE is a run's folder, OUT/CASE_RANK.txt its error
"""

import json
import os
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from bad_steps_plants import POISON, SAMPLE, SPIKE_SET, Plant, Planted, activation, gradient, gradient_of_output, weight

from megatron_prism.config import load_recipe
from megatron_prism.engine import loop, parallel
from megatron_prism.engine.recipe import TrainConfig
from megatron_prism.engine.step import DivergenceError

CASES: dict[str, tuple[list[str], Plant]] = {
    "pp, activation": (["parallel.pp=2"], activation(2, "mlp.linear_fc1", rank=1)),
    "vpp, gradient": (["parallel.pp=2", "parallel.vpp=2"], gradient_of_output(2, "mlp.linear_fc1", rank=0)),
    "tp, weight": (["parallel.tp=2"], weight(3, "mlp.linear_fc2", rank=1)),
    "sp, weight gradient": (["parallel.tp=2", "parallel.sp=true"], gradient(1, "self_attention.linear_qkv", rank=1)),
    "cp, activation": (["parallel.cp=2"], activation(0, "self_attention.linear_qkv", rank=1)),
    "dp, sample": ([], activation(1, "mlp", rank=SAMPLE % 2, sample=SAMPLE)),
    "dp, sample, skipped": (["bad_steps.on_nan=skip"], activation(1, "mlp", rank=SAMPLE % 2, sample=SAMPLE)),
    "dp, spike": (SPIKE_SET, POISON),
}

OVERLAPPING = ("dp, sample", "dp, sample, skipped", "dp, spike")
"""gradients are reduced, and weights gathered, while passes run, as on CUDA"""
WRAP_MODEL = loop.wrap_model


def overlapping(*args: Any, overlap: bool) -> Any:
    """DDP as on CUDA."""
    return WRAP_MODEL(*args, overlap=True)


def main() -> None:
    """Every case."""
    common, output = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for name, (settings, plant) in CASES.items():
        said = "finished"
        overlap = partial(mock.patch.object, loop, "wrap_model", overlapping) if name in OVERLAPPING else nullcontext
        with Planted(plant), overlap():
            try:
                loop.train(load_recipe(None, [*common, f"output={output / name}", *settings], TrainConfig))
            except DivergenceError as error:
                said = str(error)
        (output / f"{name}_{os.environ['RANK']}.txt").write_text(said)
    parallel.stop()


if __name__ == "__main__":
    main()
