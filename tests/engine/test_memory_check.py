"""A flipped bit of a weight, a master weight or a moment is found before anything is made of it, also where no other rank holds that weight."""

from pathlib import Path
from typing import Any

import pytest
import torch
from training import final_state, from_random, recipe

from megatron_prism.config import load_recipe
from megatron_prism.engine import loop, run_folder
from megatron_prism.engine.recipe import TrainConfig
from megatron_prism.errors import FaultyMachineError

pytestmark = pytest.mark.usefixtures("leave_groups")
TYPES: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": {"precision": "bf16"}, "split": {"precision": "bf16", "optimizer__split_master": True}}


def train(root: Path, name: str, bit: int | None = None, of: str = "weight", before: str = "_step", **settings: Any) -> Path:
    """A run of one rank in whose memory a bit changes, after two steps, when it is about to take a step or to save."""
    cfg = load_recipe(None, recipe(root, root / name, steps=4, checkpoint__save_interval=2, **from_random(root), **settings), TrainConfig)
    usual = getattr(loop, before)

    def after_flipping(run: Any) -> Any:
        if run.progress.step == 2 and bit is not None:
            (part,) = run.engine.optimizer.chained_optimizers
            weight = part.optimizer.param_groups[0]["params"][0]
            tensor = weight.data if of == "weight" else part.optimizer.state[weight][of]
            tensor.view(-1).view({2: torch.int16, 4: torch.int32}[tensor.element_size()])[7] ^= 1 << bit
        return usual(run)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, before, after_flipping)
        return loop.train(cfg)


@pytest.mark.parametrize(
    ("kind", "of"), [("fp32", "weight"), ("fp32", "exp_avg"), ("bf16", "weight"), ("bf16", "master_param"), ("split", "master_param")]
)
def test_a_flipped_bit_ends_the_run_before_the_next_update_and_names_the_rank(tmp_path: Path, kind: str, of: str) -> None:
    what = "the weights that it updates" if of == "weight" else "its master weights, moments or FP8 scales"
    with pytest.raises(FaultyMachineError, match=rf"step 3: memory changed since the last update, by no step of the run \(rank 0 \(.*\): {what}\)"):
        train(tmp_path, "run", bit=0, of=of, check_memory=True, **TYPES[kind])
    assert run_folder.newest(tmp_path / "run") == run_folder.step_folder(tmp_path / "run", 2)
    assert not list((tmp_path / "run").glob("bad_steps/*")), "it is no bad step of the data's"


def test_what_changed_after_an_update_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(FaultyMachineError, match="save of step 2: memory changed"):
        train(tmp_path, "run", bit=3, before="_save", check_memory=True)
    assert run_folder.newest(tmp_path / "run") is None


def test_a_sound_run_is_not_disturbed_by_looking_and_a_flip_that_nobody_looks_for_is_in_its_weights(tmp_path: Path) -> None:
    looked, plain, flipped = (
        final_state(run) for run in (train(tmp_path, "l", check_memory=True), train(tmp_path, "p"), train(tmp_path, "f", bit=3))
    )
    names = [name for name in plain if torch.is_tensor(plain[name])]
    assert all(torch.equal(looked[name], plain[name]) for name in names)
    assert not all(torch.equal(flipped[name], plain[name]) for name in names)
