"""The end of a save: what was lost on the way is seen before it is complete; what fails once it is (deleting old ones) takes nothing away."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from policy_cases import open_engine
from tiny_models import write_tiny

from megatron_prism import artifact, checksums
from megatron_prism.config import OptimizerConfig
from megatron_prism.engine import checkpoint, leftovers, parallel, run_folder, run_lock, saving
from megatron_prism.engine.checkpoint import Progress
from megatron_prism.engine.saving import Background
from megatron_prism.errors import UserError
from megatron_prism.stages import convert


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("saved")
    write_tiny("granite_hybrid", root / "hf")
    yield convert.run(convert.Config(direction="import", source=root / "hf", output=root / "checkpoint"))
    parallel.stop()


def test_a_complete_checkpoint_stays_where_the_disk_fails_afterwards(imported: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    run, config = tmp_path / "run", OptimizerConfig(lr=1e-3)

    monkeypatch.setattr(checksums, "RETRY_SECONDS", 0.0)
    refused = tmp_path / artifact.COMPLETE
    refused.symlink_to(refused)
    faults = [(tmp_path / "gone").stat, lambda: artifact.is_complete(tmp_path), (tmp_path / "gone").stat]

    def pruned_and_then_a_stale_handle() -> None:
        checkpoint.prune(run, keep_last=1, keep_every=None)
        faults.pop()()

    engine = open_engine(imported, optimizer=config)
    for step, background in enumerate((None, None, Background()), start=1):
        after = pruned_and_then_a_stale_handle
        saved = checkpoint.save(engine, run, Progress(step=step), imported / "hf", config, [], None, background, after)
        if background is not None:
            background.end()
        assert run_folder.complete_steps(run) == [saved]
        artifact.verify(saved)
        assert f"{saved} is saved; what follows a save failed" in caplog.text


def test_a_file_that_rank_0_does_not_see_as_it_was_written_makes_no_checkpoint(imported: Path, tmp_path: Path, monkeypatch) -> None:
    """As from a machine whose folder of that name is a disk of its own, or whose last bytes never arrived."""
    engine, config, run = open_engine(imported, optimizer=OptimizerConfig(lr=1e-3)), OptimizerConfig(lr=1e-3), tmp_path / "run"
    good = checkpoint.save(engine, run, Progress(step=1), imported / "hf", config, [])
    write = saving._write

    def lost(plan: saving.ShardedPlan) -> saving.Written:
        found = write(plan)
        os.truncate(plan.folder / "__0_1.distcp", 100)
        return found

    monkeypatch.setattr(saving, "_write", lost)
    with pytest.raises(UserError, match=r"step_00000002/sharded/__0_1\.distcp has 100 bytes; \d+ were written by its rank: rank 0 sees 1 of 3 files"):
        checkpoint.save(engine, run, Progress(step=2), imported / "hf", config, [])
    assert run_folder.complete_steps(run) == [good] and not run_folder.step_folder(run, 2).exists()


def test_a_save_takes_the_room_of_what_was_too_young_at_the_start(imported: Path, tmp_path: Path, monkeypatch) -> None:
    config = OptimizerConfig(lr=1e-3)
    engine, run = open_engine(imported, optimizer=config), artifact.begin(tmp_path / "run", "train", config)
    half = artifact.begin(run_folder.step_folder(run, 1), "checkpoint", config)
    with run_lock.held(run):
        assert leftovers.remove(run, "train") == [] and half.is_dir()
        monkeypatch.setattr(leftovers, "STILL_SECONDS", 0.0)
        saved = checkpoint.save(engine, run, Progress(step=2), imported / "hf", config, [])
    assert not half.exists() and run_folder.complete_steps(run) == [saved]
