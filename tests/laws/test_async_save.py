"""Saves in the background are the same checkpoints, and the same run; kill -9 while one is written leaves the one before."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from multirank import kill_tree
from refusals import HALFWAY, KEPT, SAVED, SCRIPT, STEPS, halfway, train, write_cases
from training import differing, final_state, metrics, read_state

from megatron_prism import artifact
from megatron_prism.engine import run_folder

ASYNC = {"checkpoint.async_save": True}


def kept(run: Path) -> list[list[float]]:
    return [[line[key] for key in KEPT] for line in metrics(run)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One run that waits for its saves; one that does not, with steps taken before anything is written; and one whose snapshot is no copy."""
    root = tmp_path_factory.mktemp("async")
    cases = {"sync": {}, "async": {"fault": "slow", **ASYNC}, "fault": {"fault": "slow, not copied", **ASYNC}}
    assert all(words == ["", ""] for words in train(root, root / "runs", cases).values())
    return root, root / "runs"


def test_a_checkpoint_of_the_background_is_that_of_its_step_bit_for_bit(runs):
    _, folder = runs
    assert kept(folder / "async") == kept(folder / "sync")
    for step in (SAVED, HALFWAY, STEPS):
        found, expected = (read_state(run_folder.step_folder(folder / name, step)) for name in ("async", "sync"))
        assert differing(found, expected) == [], step
        artifact.verify(run_folder.step_folder(folder / "async", step))
    assert differing(*(read_state(run_folder.step_folder(folder / name, SAVED)) for name in ("fault", "sync"))) != []  # law 8: it is seen


@pytest.mark.slow
def test_a_run_that_is_killed_while_the_background_writes_goes_on_from_the_checkpoint_before_it(runs, tmp_path):
    root, _ = runs
    again = tmp_path / "again"
    cases = write_cases(root, again, {"run": {"fault": "slow", **ASYNC}})
    alone = [sys.executable, str(SCRIPT), str(cases)]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent.parent), "OMP_NUM_THREADS": "1"}
    run, second = again / "run", run_folder.step_folder(again / "run", HALFWAY)
    process = subprocess.Popen(alone, env={**environment, "SLOW_SECONDS": "4"})
    try:
        end = time.monotonic() + 120
        while not (second / "sharded").is_dir() or len(metrics(run)) <= HALFWAY:
            assert process.poll() is None and time.monotonic() < end, "the run ended or hung before the moment to kill it"
            time.sleep(0.01)
    finally:
        kill_tree(process.pid)
    assert not artifact.is_complete(second) and run_folder.newest(run) == run_folder.step_folder(run, SAVED)
    subprocess.run(alone, env={**environment, "SLOW_SECONDS": "0"}, check=True, timeout=120)
    assert (again / "run.0").read_text().startswith('{"words": ""')
    whole = tmp_path / "whole"
    subprocess.run([sys.executable, str(SCRIPT), str(write_cases(root, whole, {"run": {}}))], env=environment, check=True, timeout=120)
    assert kept(run) == kept(whole / "run")
    assert differing(final_state(run), final_state(whole / "run")) == []


@pytest.mark.slow
def test_a_resumed_run_with_saves_in_the_background_equals_an_unbroken_one(runs, tmp_path):
    root, folder = runs
    halfway(folder / "async", tmp_path / "resumed" / "run")
    assert train(root, tmp_path / "resumed", {"run": {"fault": "slow", **ASYNC}}) == {"run": ["", ""]}
    assert kept(tmp_path / "resumed" / "run") == kept(folder / "sync")
    assert differing(final_state(tmp_path / "resumed" / "run"), final_state(folder / "sync")) == []
