"""Where the checkpoints of a training run lie, which of them may be read, and what they say. No torch here: recipes are checked with it too."""

import json
from pathlib import Path
from typing import Any

from megatron_prism import artifact, checksums
from megatron_prism.errors import UserError

CHECKPOINTS = "checkpoints"
STATE = "state.json"
STATE_SCHEMA_VERSION = 2
"""2: with the plans of the data so far, and what was taken of each source"""


def step_folder(run: Path, step: int) -> Path:
    """Folder of one step's checkpoint."""
    return run / CHECKPOINTS / f"step_{step:08d}"


def complete_steps(run: Path) -> list[Path]:
    """Folders of the complete checkpoints of a run, oldest first."""
    return [folder for folder in sorted((run / CHECKPOINTS).glob("step_????????")) if artifact.is_complete(folder)]


def is_of(run: Path, stage: str) -> bool:
    """Whether the folder is a run of this stage; what else may lie there is looked at, and refused, by `artifact.begin`."""
    return checksums.size_of(run / artifact.PROVENANCE) is not None and artifact.provenance(run)["kind"] == stage


def newest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, finished or not."""
    steps = complete_steps(run)
    return steps[-1] if steps else None


def resolve(path: Path) -> Path:
    """The checkpoint folder that a path means: itself, or a run's newest complete one. Errors: UserError naming what is wrong."""
    if (path / CHECKPOINTS).is_dir():
        found = newest(path)
        if found is None:
            raise UserError(f"{path} is a run without a complete checkpoint; let it reach its first save (checkpoint.save_interval)")
        path = found
    artifact.require(path, "checkpoint", "a checkpoint or a training run")
    return path


def find_weights(path: Path, key: str) -> Path:
    """The folder that holds a model's weights: a checkpoint, a run's newest complete one, or a Hugging Face folder. key: what the recipe calls it.

    Errors: UserError for what is no model, or is not finished.
    """
    if not path.is_dir():
        raise UserError(f"{key}={path} is no folder; give a checkpoint, a training run or a Hugging Face folder")
    if (path / CHECKPOINTS).is_dir() or (path / "sharded").is_dir():
        return resolve(path)
    if (path / artifact.PROVENANCE).is_file():
        artifact.require(path, "hf", "a checkpoint, a training run or a Hugging Face folder")
    if not (path / "config.json").is_file():
        raise UserError(f"{key}={path} holds no model: neither config.json, nor sharded/, nor a run's checkpoints/")
    return path


def hf_files(folder: Path) -> Path:
    """Config and tokenizer of a folder that `find_weights` found."""
    return folder / "hf" if (folder / "sharded").is_dir() else folder


def damage(checkpoint: Path, name: str) -> str | None:
    """What is wrong with one small file of a complete checkpoint; None where nothing is, or nobody knows."""
    expected, _ = artifact.expected_checksums(checkpoint)
    return checksums.damage(checkpoint / name, expected[name]) if expected and name in expected else None


def check_apart(output: Path, path: Path, found: Path) -> None:
    """Of an output, a path that a recipe names and the folder that it stands for. Errors: UserError where one would be written into the other."""
    target = output.resolve()
    if found.resolve().is_relative_to(target):
        raise UserError(f"output={output} holds {found}, which is read; choose another output")
    if target.is_relative_to(path.resolve()):
        raise UserError(f"output={output} lies in {path}, which is read, and a run counts all files in its folder as its own; choose another output")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a training checkpoint. Errors: UserError for one that was only converted, or of a newer schema."""
    if not (checkpoint / STATE).is_file():
        raise UserError(f"{checkpoint} holds a model but no training state; start from it with model.load='weights'")
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    if state["schema_version"] > STATE_SCHEMA_VERSION:
        raise UserError(
            f"{checkpoint / STATE} has schema {state['schema_version']}, this version reads up to {STATE_SCHEMA_VERSION}; upgrade megatron-prism"
        )
    return state
