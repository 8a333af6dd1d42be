"""A job as a nemo-run experiment. nemo-run has an environment of its own (the extra `launch`); without it these are skipped, but for the message."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

from megatron_prism.errors import UserError
from megatron_prism.launch import nemo
from megatron_prism.launch.job import Job

INSTALLED = importlib.util.find_spec("nemo_run") is not None
needs_nemo_run = pytest.mark.skipif(not INSTALLED, reason="nemo-run is not installed: the extra `launch`")


@pytest.mark.skipif(INSTALLED, reason="nemo-run is installed")
def test_without_nemo_run_the_extra_to_install_is_named() -> None:
    with pytest.raises(UserError, match=r"megatron-prism\[launch\]"):
        nemo.task(Job("train"))


def test_several_nodes_need_the_executors_launcher() -> None:
    with pytest.raises(UserError, match="launcher='torchrun'"):
        nemo.task(Job("train", ranks=4, nodes=2))


@needs_nemo_run
def test_under_an_executors_launcher_the_task_is_the_plain_command() -> None:
    task = nemo.task(Job("train", Path("midtrain.toml"), ("train.steps=20",), ranks=16, nodes=2, env={"A": "1"}), launcher=True)
    assert (task.entrypoint, task.m, task.path, task.args) == ("python", True, "megatron_prism", ["train", "midtrain.toml", "train.steps=20"])
    assert task.env == {"A": "1"}


@needs_nemo_run
@pytest.mark.parametrize(("ending", "succeeded"), [("well", True), ("raise", False)])
def test_an_experiment_on_this_machine_runs_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, succeeded: bool) -> None:
    (tmp_path / "counting").mkdir()
    (tmp_path / "counting/__init__.py").touch()
    shutil.copy(Path(__file__).parent / "own_stage.py", tmp_path / "counting")
    monkeypatch.setenv("NEMORUN_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
    job = Job("counting.own_stage", None, (f'output="{tmp_path / "out"}"', f'ending="{ending}"'), ranks=2)
    assert nemo.run_experiment(job, "counting test") is succeeded
    assert (tmp_path / "out/COMPLETE").exists() is succeeded
    assert sys.executable in nemo.task(job).entrypoint
