"""Where the checkpoints of a training run lie, and which of them may be read. No torch here: recipes are checked with it too."""

from pathlib import Path

from megatron_prism import artifact
from megatron_prism.errors import UserError

CHECKPOINTS = "checkpoints"


def step_folder(run: Path, step: int) -> Path:
    """Folder of one step's checkpoint."""
    return run / CHECKPOINTS / f"step_{step:08d}"


def complete_steps(run: Path) -> list[Path]:
    """Folders of the complete checkpoints of a run, oldest first."""
    return [folder for folder in sorted((run / CHECKPOINTS).glob("step_????????")) if artifact.is_complete(folder)]


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
    artifact.require(path, "checkpoint")
    return path
