"""Law 4: a resumed run equals an unbroken run, bit for bit: also after kill -9 at any moment; and to 1e-5 after a change of layout."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from multirank import kill_tree
from training import differing, final_state, from_random, largest_difference, metrics, recipe, run_cases

from megatron_prism.engine import checkpoint, run_folder

STEPS, HALF = 6, 3
SAVING = {"steps": STEPS, "checkpoint__save_interval": HALF, "checkpoint__keep_last": 10}
KEPT = ("loss", "grad_norm", "lr", "tokens")
CASES = {
    "dp, dropout": {"hidden_dropout": 0.1},
    "dp, bf16": {"precision": "bf16"},
    "tp_sp": {"parallel.tp": 2, "parallel.sp": "true", "hidden_dropout": 0.1},
    "pp_vpp": {"parallel.pp": 2, "parallel.vpp": 2},
}


def halfway_copy(run: Path, to: Path) -> None:
    """A run as it lies on disk when it is killed after its first checkpoint and before its second."""
    shutil.copytree(run, to)
    (to / "COMPLETE").unlink()
    checkpoint.remove(run_folder.step_folder(to, STEPS))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """Unbroken runs of every case on two ranks."""
    root = tmp_path_factory.mktemp("resume")
    run_cases(root, 2, {name: {"set": case} for name, case in CASES.items()}, **SAVING, **from_random(root))
    return root, {name: root / "runs_2_0" / name for name in CASES}


@pytest.mark.slow
def test_a_resumed_run_equals_an_unbroken_run_bit_for_bit(unbroken):
    root, runs = unbroken
    resumed = root / "runs_2_1"
    for name, run in runs.items():
        halfway_copy(run, resumed / name)
    run_cases(root, 2, {name: {"set": case} for name, case in CASES.items()}, folder=resumed, **SAVING, **from_random(root))
    for name, run in runs.items():
        assert [[line[key] for key in KEPT] for line in metrics(resumed / name)] == [[line[key] for key in KEPT] for line in metrics(run)], name
        assert differing(final_state(resumed / name), final_state(run)) == [], name


@pytest.mark.slow
def test_one_step_counter_shared_by_all_weights_breaks_the_equality(unbroken):
    """Law 8: a fault that megatron-core has with torch's Adam (0.16.1), and that our AdamW cannot have: its step belongs to the group."""
    root, runs = unbroken
    name = "dp, dropout"
    folder = root / "runs_2_fault"
    halfway_copy(runs[name], folder / name)
    run_cases(root, 2, {name: {"set": CASES[name], "fault": "shared_adam_step"}}, folder=folder, **SAVING, **from_random(root))
    assert differing(final_state(folder / name), final_state(runs[name])) != []


@pytest.mark.slow
def test_a_run_goes_on_under_another_layout(unbroken):
    root, runs = unbroken
    layouts = {"tp_sp": {"parallel.tp": 2, "parallel.sp": "true"}, "pp": {"parallel.pp": 2}, "dp": {}}
    folder = root / "runs_2_layouts"
    for name in layouts:
        halfway_copy(runs["pp_vpp"], folder / name)
    found = run_cases(root, 2, {name: {"set": layout} for name, layout in layouts.items()}, folder=folder, **SAVING, **from_random(root))
    differences = {name: largest_difference(lines, metrics(runs["pp_vpp"])) for name, lines in found.items()}
    assert max(differences.values()) < 1e-5, differences


def start(arguments: list[str]) -> "subprocess.Popen[bytes]":
    """`prism train` on two ranks, as a user starts it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "megatron_prism", "train", *arguments]
    return subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def kill_when(reached: Callable[[], bool], arguments: list[str], timeout_seconds: float = 120) -> None:
    """Start a run and kill -9 all of it at the moment that `reached` says."""
    process = start(arguments)
    try:
        end = time.monotonic() + timeout_seconds
        while not reached():
            assert process.poll() is None and time.monotonic() < end, f"the run ended ({process.poll()}) or hung before the moment to kill it"
            time.sleep(0.002)
    finally:
        kill_tree(process.pid)


@pytest.mark.slow
def test_kill_9_in_a_step_and_in_a_save_loses_nothing(unbroken):
    root, runs = unbroken
    name = "dp, dropout"
    run = root / "killed"
    arguments = recipe(root, run, **SAVING, **from_random(root), **CASES[name])
    first, last = run_folder.step_folder(run, HALF), run_folder.step_folder(run, STEPS)

    kill_when(lambda: (first / "sharded").is_dir(), arguments)
    assert run_folder.newest(run) is None or run_folder.newest(run) == first
    kill_when(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) > HALF, arguments)
    assert run_folder.newest(run) == first
    kill_when(lambda: (last / "sharded").is_dir(), arguments)
    assert start(arguments).wait(120) == 0

    assert [[line[key] for key in KEPT] for line in metrics(run)] == [[line[key] for key in KEPT] for line in metrics(runs[name])]
    assert differing(final_state(run), final_state(runs[name])) == []
