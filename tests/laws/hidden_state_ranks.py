"""Started on N ranks by test_hidden_states_ranks: mean hidden states of several models under several layouts, in one launch.

    hidden_state_ranks.py CASES.json
    CASES: {"root": folder with MODEL (Hugging Face folders), "output": folder, "cases": {"MODEL word ...": {"layout": {"tp": 2}, "fault": null}},
            "recipes": [recipe of prism cka, ...], "refused": recipe of prism cka}

OUTPUT/CASE.npy: [points, inputs, width], written by rank 0. OUTPUT/refused.RANK.txt: what each rank was told.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from megatron_prism import families
from megatron_prism.config import ParallelConfig, load_recipe
from megatron_prism.engine import hidden_states, parallel
from megatron_prism.engine.padded_batches import sum_of_real
from megatron_prism.errors import UserError
from megatron_prism.planning.layout import make_plan
from megatron_prism.stages import cka

LENGTHS = (3, 17, 1, 9, 30, 12, 5)


def inputs() -> list[list[int]]:
    """Token ids that every tiny model knows."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 97, (length,), generator=generator).tolist() for length in LENGTHS]


def run_case(folder: Path, layout: dict[str, Any]) -> torch.Tensor | None:
    """The states of one model, several batches of it, so that every stage and every data-parallel rank has some."""
    asked, ranks = ParallelConfig(**layout), parallel.world_size()
    plan = make_plan(families.load(folder)[1], asked, ranks, asked.tp, global_batch=ranks // asked.model_ranks, micro_batch=1)
    with hidden_states.open_engine(folder, plan, "fp32", "cpu") as model:
        return model.pooled(inputs(), 40, lambda count: None)


FAULTS: dict[str | None, Any] = {
    None: contextlib.nullcontext(),
    # each rank takes its part of the sequence for the beginning
    "parts_begin_at_0": mock.patch.object(hidden_states, "sum_of_real", lambda hidden, lengths, first: sum_of_real(hidden, lengths)),
    # a tensor-parallel rank takes the first rows of what it is to hold a later part of
    "first_rows_everywhere": mock.patch.object(
        hidden_states, "_fill", lambda targets, whole: [_from_0(part, memory, whole) for part, memory in targets]
    ),
}


def _from_0(part: Any, memory: torch.Tensor, whole: torch.Tensor) -> None:
    size = hidden_states.inside(part, tuple(whole.shape))
    place = tuple(slice(0, length) for length in size)
    memory[place].copy_(whole[place])


def main() -> None:
    """Every case in turn, groups rebuilt for each; then every recipe."""
    plan = json.loads(Path(sys.argv[1]).read_text())
    for name, case in plan["cases"].items():
        with FAULTS[case.get("fault")]:
            found = run_case(Path(plan["root"]) / name.split()[0], case["layout"])
        if found is not None:
            np.save(Path(plan["output"]) / f"{name}.npy", found.numpy())
    with mock.patch.object(parallel, "stop"):  # this launch's process group cannot be joined twice
        for recipe in plan["recipes"]:
            cka.run(load_recipe(Path(recipe), [], cka.Config))
        try:
            cka.run(load_recipe(Path(plan["refused"]), [], cka.Config))
        except UserError as error:
            (Path(plan["output"]) / f"refused.{dist.get_rank()}.txt").write_text(str(error))
    parallel.stop()


if __name__ == "__main__":
    main()
