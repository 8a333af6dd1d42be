"""Saves in the background are the same checkpoints, and the same run; kill -9 while one is written leaves the one before."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from multirank import kill_tree
from refusals import HALFWAY, KEPT, SAVED, SCRIPT, STEPS, halfway, train, write_cases
from training import differing, final_state, metrics, read_state

from megatron_prism import artifact
from megatron_prism.engine import run_folder
from megatron_prism.engine.weights import export_hf

ASYNC = {"checkpoint.async_save": True}
SOON_SECONDS = 60
"""ranks that wait for each other do so for 30 minutes"""


def kept(run: Path) -> list[list[float]]:
    return [[line[key] for key in KEPT] for line in metrics(run)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One run that waits for its saves; one that does not, with steps taken before anything is written; and one whose snapshot is no copy."""
    root = tmp_path_factory.mktemp("async")
    slow = {"fault": "slow", **ASYNC}
    cases = {"sync": {}, "async": slow, "fault": {"fault": "slow, not copied", **ASYNC}, "exported": {**slow, "export.interval": SAVED}}
    told = train(root, root / "runs", cases | {"no copy": {"fault": "one copy", **ASYNC}})
    assert all(words == ["", ""] for name, words in told.items() if name in cases)
    return root, root / "runs"


def test_a_checkpoint_of_the_background_is_that_of_its_step_bit_for_bit(runs):
    _, folder = runs
    assert kept(folder / "async") == kept(folder / "sync")
    for step in (SAVED, HALFWAY, STEPS):
        found, expected = (read_state(run_folder.step_folder(folder / name, step)) for name in ("async", "sync"))
        assert differing(found, expected) == [], step
        artifact.verify(run_folder.step_folder(folder / "async", step))
    assert differing(*(read_state(run_folder.step_folder(folder / name, SAVED)) for name in ("fault", "sync"))) != []  # law 8: it is seen


def test_a_rank_that_has_no_memory_for_its_copy_ends_all_ranks_with_one_error_soon(runs):
    _, folder = runs
    first, second = (json.loads((folder / f"no copy.{rank}").read_text()) for rank in range(2))
    assert first["words"] == second["words"]
    assert "of host memory for the copy of a checkpoint cannot be had on" in first["words"] and "checkpoint.async_save=false" in first["words"]
    assert max(first["seconds"], second["seconds"]) < SOON_SECONDS
    assert len(metrics(folder / "no copy")) < STEPS, "no step is taken once it is known"
    assert not run_folder.step_folder(folder / "no copy", SAVED).exists()


def test_an_export_waits_for_the_checkpoint_that_it_is_made_from(runs):
    _, folder = runs
    for step, made in ((SAVED, f"hf_steps/step_{SAVED:08d}"), (HALFWAY, f"hf_steps/step_{HALFWAY:08d}"), (STEPS, "hf")):
        again = export_hf(run_folder.step_folder(folder / "exported", step), folder / f"again_{step}", "float32")
        assert (folder / "exported" / made / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


def start_alone(cases: Path, slow_seconds: float) -> "subprocess.Popen[bytes]":
    """The cases in a process of their own, a world of one."""
    ours = {"PYTHONPATH": str(SCRIPT.parent.parent), "OMP_NUM_THREADS": "1", "SLOW_SECONDS": str(slow_seconds)}
    return subprocess.Popen([sys.executable, str(SCRIPT), str(cases)], env={**os.environ, **ours})


def wait_until(reached: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + 120
    while not reached():
        assert process.poll() is None and time.monotonic() < end, "the run ended or hung before the moment"
        time.sleep(0.01)


def is_writing(run: Path, step: int) -> bool:
    """Whether the background writes this step's checkpoint, and the run took another step meanwhile."""
    return (run_folder.step_folder(run, step) / "sharded").is_dir() and len(metrics(run)) > step


def test_sigterm_while_the_background_writes_leaves_both_checkpoints_complete(runs, tmp_path):
    root, _ = runs
    run = tmp_path / "stopped" / "run"
    # no other save is due, so that the run stops at a step of its own
    process = start_alone(write_cases(root, tmp_path / "stopped", {"run": {"fault": "slow", **ASYNC, "steps": 2000}}), 2)
    try:
        wait_until(lambda: is_writing(run, SAVED), process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    finally:
        kill_tree(process.pid)
    saved = run_folder.complete_steps(run)
    assert saved[0] == run_folder.step_folder(run, SAVED) and len(saved) > 1 and not artifact.is_complete(run)
    assert len(metrics(run)) == run_folder.read_state(saved[-1])["progress"]["step"]
    for folder in saved:
        artifact.verify(folder)


@pytest.mark.slow
def test_a_run_that_is_killed_while_the_background_writes_goes_on_from_the_checkpoint_before_it(runs, tmp_path):
    root, _ = runs
    cases = write_cases(root, tmp_path / "again", {"run": {"fault": "slow", **ASYNC}})
    run = tmp_path / "again" / "run"
    second = run_folder.step_folder(run, HALFWAY)
    process = start_alone(cases, 4)
    try:
        wait_until(lambda: is_writing(run, HALFWAY), process)
    finally:
        kill_tree(process.pid)
    assert not artifact.is_complete(second) and run_folder.newest(run) == run_folder.step_folder(run, SAVED)
    assert start_alone(cases, 0).wait(120) == 0
    assert json.loads((tmp_path / "again" / "run.0").read_text())["words"] == ""
    whole = tmp_path / "whole"
    assert start_alone(write_cases(root, whole, {"run": {}}), 0).wait(120) == 0
    assert kept(run) == kept(whole / "run")
    assert differing(final_state(run), final_state(whole / "run")) == []


@pytest.mark.slow
def test_a_resumed_run_with_saves_in_the_background_equals_an_unbroken_one(runs, tmp_path):
    root, folder = runs
    halfway(folder / "async", tmp_path / "resumed" / "run")
    assert train(root, tmp_path / "resumed", {"run": {"fault": "slow", **ASYNC}}) == {"run": ["", ""]}
    assert kept(tmp_path / "resumed" / "run") == kept(folder / "sync")
    assert differing(final_state(tmp_path / "resumed" / "run"), final_state(folder / "sync")) == []
