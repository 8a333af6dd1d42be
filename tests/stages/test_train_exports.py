"""What a training run exports: at its interval and at its end, and what an error or kill -9 came before, at the next start."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from training import from_random, metrics, recipe

from megatron_prism import artifact
from megatron_prism.config import load_recipe
from megatron_prism.engine import loop, run_folder, weights
from megatron_prism.engine.recipe import TrainConfig

pytestmark = pytest.mark.usefixtures("leave_groups")

EXPORTING = {"steps": 4, "checkpoint__save_interval": 2, "export__interval": 2}


def trained(root: Path, **settings: Any) -> Path:
    """A run in ROOT/run, or what is left of it gone on with."""
    return loop.train(load_recipe(None, recipe(root, root / "run", **from_random(root), **{**EXPORTING, **settings}), TrainConfig))


def dying(at_step: int) -> Any:
    """An export that fails half-way at this step, and is right before."""

    def export(checkpoint: Path, output: Path, dtype: str, right: Any = weights.export_hf) -> Path:
        if checkpoint.name != f"step_{at_step:08d}":
            return right(checkpoint, output, dtype)
        output.mkdir(parents=True, exist_ok=True)
        (output / "model.safetensors").write_text("half")
        raise OSError("no space left on device")

    return export


def exported_weights(folder: Path) -> list[float]:
    return [float(tensor.double().sum()) for _, tensor in sorted(load_file(folder / "model.safetensors").items())]


def assert_is_export_of(folder: Path, run: Path, step: int, scratch: Path) -> None:
    """The folder is what its checkpoint exports."""
    expected = weights.export_hf(run_folder.step_folder(run, step), scratch, "float32")
    assert exported_weights(folder) == exported_weights(expected)


@pytest.mark.parametrize(("died_at", "folder"), [(4, "hf"), (2, "hf_steps/step_00000002")])
def test_an_export_that_died_after_the_save_is_made_at_the_next_start(tmp_path: Path, monkeypatch: Any, died_at: int, folder: str) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("megatron_prism.engine.calendar.export_hf", dying(died_at))
        with pytest.raises(OSError, match="no space left"):
            trained(tmp_path)
    assert not artifact.is_complete(tmp_path / "run")
    run = trained(tmp_path)
    assert_is_export_of(run / folder, run, died_at, tmp_path / "expected")
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4] and artifact.is_complete(run), "no step was taken again"


def test_an_export_of_fewer_steps_is_not_taken_for_the_last(tmp_path: Path, monkeypatch: Any) -> None:
    """The run was killed as a run of two steps, exported and all, and goes on as one of four whose export then dies."""
    (trained(tmp_path, steps=2) / artifact.COMPLETE).unlink()
    with monkeypatch.context() as patched:
        patched.setattr("megatron_prism.engine.calendar.export_hf", dying(4))
        with pytest.raises(OSError, match="no space left"):
            trained(tmp_path)
    run = trained(tmp_path)
    assert_is_export_of(run / "hf", run, 4, tmp_path / "expected")


def test_what_is_there_is_not_exported_again(tmp_path: Path) -> None:
    run = trained(tmp_path)
    written = [(run / folder / "model.safetensors").stat().st_mtime_ns for folder in ("hf", "hf_steps/step_00000002")]
    trained(tmp_path)
    assert [(run / folder / "model.safetensors").stat().st_mtime_ns for folder in ("hf", "hf_steps/step_00000002")] == written


def test_a_branch_does_not_owe_what_its_trunk_did(tmp_path: Path) -> None:
    """It begins at the trunk's step 2, where an export would be due, of a checkpoint that it does not have."""
    trunk = loop.train(load_recipe(None, recipe(tmp_path, tmp_path / "trunk", **from_random(tmp_path), steps=2), TrainConfig))
    start = {"model__checkpoint": str(trunk), "model__load": "all"}
    branch = loop.train(load_recipe(None, recipe(tmp_path, tmp_path / "branch", **start, **EXPORTING), TrainConfig))
    assert (branch / "hf" / "config.json").is_file() and not (branch / "hf_steps").exists()
