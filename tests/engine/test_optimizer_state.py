"""The cutting of flat ranges into boxes, against a brute-force cover; masters that are loaded into a run of another precision."""

import math
import random
from pathlib import Path

import pytest
import torch
from training import final_state, from_random, recipe

from megatron_prism.config import load_recipe
from megatron_prism.engine import loop
from megatron_prism.engine.optimizer_state import boxes
from megatron_prism.engine.recipe import TrainConfig


def test_boxes_cover_a_flat_range_exactly_once_in_order():
    draw = random.Random(3)
    for _ in range(400):
        shape = [draw.randint(1, 6) for _ in range(draw.randint(1, 4))]
        start, stop = sorted(draw.randint(0, math.prod(shape)) for _ in range(2))
        flat = torch.arange(math.prod(shape)).view(shape)
        found = [flat[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))].flatten() for offset, size in boxes(shape, start, stop)]
        covered = torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)
        assert covered.tolist() == list(range(start, stop)), (shape, start, stop)


def test_a_range_of_a_matrix_is_at_most_three_boxes():
    assert list(boxes((5, 10), 7, 43)) == [((0, 7), (1, 3)), ((1, 0), (3, 10)), ((4, 0), (1, 3))]
    assert list(boxes((5, 10), 10, 40)) == [((1, 0), (3, 10))]
    assert list(boxes((5, 10), 12, 17)) == [((1, 2), (1, 5))]
    assert list(boxes((5, 10), 20, 20)) == []


@pytest.mark.usefixtures("leave_groups")
def test_a_run_in_fp32_begins_with_the_masters_of_a_run_in_bf16_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = recipe(tmp_path, tmp_path / "bf16", steps=2, checkpoint__save_interval=2, precision="bf16", **from_random(tmp_path))
    loop.train(load_recipe(None, first, TrainConfig))
    masters = [value.flatten() for name, value in final_state(tmp_path / "bf16").items() if name.startswith("optimizer.state.param.")]
    weights: list[torch.Tensor] = []
    step = loop._step

    def seen(run):
        if not weights:
            weights.extend(weight.detach().flatten().clone() for weight in run.engine.model[0].parameters())
        return step(run)

    monkeypatch.setattr(loop, "_step", seen)
    words = recipe(tmp_path, tmp_path / "fp32", steps=3, checkpoint__save_interval=3, model__checkpoint=str(tmp_path / "bf16"), model__load="all")
    loop.train(load_recipe(None, words, TrainConfig))
    found = torch.cat(weights).sort().values
    assert not torch.equal(found, found.bfloat16().float()), "rounded masters would pass too"
    assert torch.equal(found, torch.cat(masters).sort().values)
