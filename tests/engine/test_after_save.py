"""What follows a save that is complete (deleting old ones, looking at the room that is left) can fail, and takes nothing away."""

from pathlib import Path

import pytest
from policy_cases import open_engine
from tiny_models import write_tiny

from megatron_prism import artifact
from megatron_prism.config import OptimizerConfig
from megatron_prism.engine import checkpoint, parallel, run_folder
from megatron_prism.engine.checkpoint import Progress
from megatron_prism.engine.saving import Background
from megatron_prism.stages import convert


def test_a_complete_checkpoint_stays_where_the_disk_fails_afterwards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tiny("granite_hybrid", tmp_path / "hf")
    imported = convert.run(convert.Config(direction="import", source=tmp_path / "hf", output=tmp_path / "checkpoint"))
    run, config = tmp_path / "run", OptimizerConfig(lr=1e-3)

    def pruned_and_then_a_stale_handle() -> None:
        checkpoint.prune(run, keep_last=1, keep_every=None)
        (tmp_path / "gone").stat()

    try:
        engine = open_engine(imported, optimizer=config)
        for step, background in enumerate((None, None, Background()), start=1):
            after = pruned_and_then_a_stale_handle
            saved = checkpoint.save(engine, run, Progress(step=step), imported / "hf", config, [], None, background, after)
            if background is not None:
                background.end()
            assert run_folder.complete_steps(run) == [saved]
            artifact.verify(saved)
            assert f"{saved} is saved; what follows a save failed" in caplog.text
    finally:
        parallel.stop()
