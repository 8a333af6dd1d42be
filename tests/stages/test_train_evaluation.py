"""A small suite inside training: it changes nothing of the run, is asked once a step whatever is killed, and says what `prism evaluate` would say."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_blend import write_tiny_blend
from tiny_hf import make_tiny_tokenizer
from training import TINY_LLAMA, differing, final_state, metrics, recipe

from megatron_prism import artifact
from megatron_prism.config import load_recipe, to_toml, validate
from megatron_prism.engine import checkpoint, run_folder
from megatron_prism.engine.recipe import TrainConfig
from megatron_prism.errors import StoppedEarly, UserError
from megatron_prism.evals.frames import records
from megatron_prism.evals.inline import apart
from megatron_prism.stages import evaluate, train

TASK = 'name = "sums"\ndomain = "math"\ndataset = "chain_sum"\nnum_questions = 5\nmax_new_tokens = 6\ntemperature = 1.0\nn = 2\n'
KEPT = ("step", "loss", "grad_norm", "lr", "tokens")


pytestmark = pytest.mark.usefixtures("leave_groups")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config and tokenizer in `model`, a task file, a blend."""
    folder = tmp_path_factory.mktemp("train_evaluation")
    make_tiny_tokenizer(folder / "model")
    (folder / "model" / "config.json").write_text(json.dumps({**TINY_LLAMA, "vocab_size": 300, "max_position_embeddings": 128, "eos_token_id": 0}))
    (folder / "sums.toml").write_text(TASK)
    (folder / "talk.toml").write_text(TASK.replace("sums", "talk") + "chat = true\n")
    write_tiny_blend(folder / "data", 300)
    return folder


def config(root: Path, output: Path, task: str | None = "sums", **settings: Any) -> TrainConfig:
    start = {"model__hf_config": str(root / "model"), "model__tokenizer": str(root / "model")}
    common = {"steps": 6, "checkpoint__save_interval": 3, "checkpoint__keep_last": None, "hidden_dropout": 0.1}
    asked = {"evaluation__interval": 3, "evaluation__tasks": [str(root / f"{task}.toml")], "evaluation__grading_workers": 0} if task else {}
    return load_recipe(None, recipe(root, output, **{**start, **common, **asked, **settings}), TrainConfig)


def scores(run: Path) -> list[dict[str, Any]]:
    """The lines of evaluations, without what the clock says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "evaluation/seconds" in line]
    assert all(line["evaluation/seconds"] > 0 for line in found)
    return [{key: value for key, value in line.items() if key not in ("time", "evaluation/seconds")} for line in found]


def trained(run: Path) -> list[list[Any]]:
    return [[line[key] for key in KEPT] for line in metrics(run)]


def texts(run: Path, step: int) -> list[str]:
    return [record["text"] for record in records(run / "evaluation" / "responses" / f"step_{step:08d}" / "sums.jsonl.zst")]


@pytest.fixture(scope="module")
def unbroken(root: Path) -> Path:
    return train.run(config(root, root / "unbroken"))


def test_evaluating_changes_no_bit_of_the_training(root: Path, unbroken: Path) -> None:
    without = train.run(config(root, root / "without", task=None))
    assert trained(unbroken) == trained(without)
    assert differing(final_state(unbroken), final_state(without)) == []
    assert [line["step"] for line in scores(unbroken)] == [3, 6]
    assert scores(without) == []
    artifact.require(unbroken, "train")


def test_its_scores_are_those_of_prism_evaluate(root: Path, unbroken: Path) -> None:
    found = scores(unbroken)[-1]
    assert found.keys() >= {"evaluation/score", "evaluation/standard_error", "evaluation/sums", "evaluation/sums/truncated"}
    models = [{"name": "last", "path": str(run_folder.step_folder(unbroken, 6))}]
    asked = {"output": str(root / "scores"), "models": models, "tasks": {"names": [str(root / "sums.toml")], "grading_workers": 0}}
    evaluate.run(validate(asked, evaluate.Config, where="test"))
    task = json.loads((root / "scores" / "scores.json").read_text())["models"]["last"]["tasks"]["sums"]
    assert [found["evaluation/score"], found["evaluation/sums/no_answer"]] == [task["accuracy"], task["no_answer"]]
    assert found["evaluation/sums/mean_tokens"] == task["mean_tokens"]
    ours = texts(unbroken, 6)
    assert ours == [record["text"] for record in records(root / "scores" / "responses" / "last" / "sums.jsonl.zst")]
    assert len(ours) == 10 and ours != texts(unbroken, 3)
    assert not (unbroken / "evaluation" / "parts").exists()


@pytest.mark.slow
def test_two_ranks_share_the_questions_and_train_as_they_would_without(root: Path) -> None:
    for name, task in (("two", "sums"), ("two_without", None)):
        recipe_file = to_file(config(root, root / name, task))
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "megatron_prism",
            "train",
            str(recipe_file),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env={**os.environ, "PYTHONSAFEPATH": "1"})
        assert done.returncode == 0, done.stdout + done.stderr
    assert trained(root / "two") == trained(root / "two_without")
    assert differing(final_state(root / "two"), final_state(root / "two_without")) == []
    assert [line["step"] for line in scores(root / "two")] == [3, 6]
    assert [len(texts(root / "two", step)) for step in (3, 6)] == [10, 10]


def to_file(cfg: TrainConfig) -> Path:
    """A recipe as a file."""
    file = cfg.output.with_suffix(".toml")
    file.write_text(to_toml(cfg))
    return file


@pytest.mark.parametrize("stopped", ["after the evaluation", "before it"])
def test_a_resumed_run_evaluates_each_step_once(root: Path, unbroken: Path, stopped: str) -> None:
    """The folder as kill -9 leaves it after the first checkpoint; where it came before the evaluation, half of the responses are there."""
    run = shutil.copytree(unbroken, root / stopped.replace(" ", "_"))
    (run / "COMPLETE").unlink()
    checkpoint.remove(run_folder.step_folder(run, 6))
    shutil.rmtree(run / "evaluation" / "responses" / "step_00000006")
    if stopped == "before it":
        lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if "evaluation" not in line and '"step": 6' not in line]
        (run / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
        shutil.rmtree(run / "evaluation" / "responses")
    modified = (run / "evaluation" / "responses" / "step_00000003" / "sums.json").stat().st_mtime_ns if stopped != "before it" else None
    train.run(config(root, run))
    assert scores(run) == scores(unbroken)
    assert trained(run) == trained(unbroken)
    assert [texts(run, step) for step in (3, 6)] == [texts(unbroken, step) for step in (3, 6)]
    assert modified in (None, (run / "evaluation" / "responses" / "step_00000003" / "sums.json").stat().st_mtime_ns)


def test_a_run_that_is_asked_to_stop_stops_and_evaluates_when_it_goes_on(root: Path, unbroken: Path) -> None:
    run = root / "stopped"
    settings = {"checkpoint__save_interval": 1, "evaluation__interval": 1, "steps": 2}
    with pytest.raises(StoppedEarly):
        train.run(config(root, run, time_limit_minutes=1e-6, **settings))
    assert scores(run) == [] and run_folder.newest(run) == run_folder.step_folder(run, 1)
    train.run(config(root, run, **settings))
    assert [line["step"] for line in scores(run)] == [1, 2]


def test_a_stop_at_the_last_step_leaves_the_evaluation_owed_and_the_run_unfinished(root: Path) -> None:
    run, settings = root / "stopped_at_last", {"checkpoint__save_interval": 1, "evaluation__interval": 1, "steps": 1}
    with pytest.raises(StoppedEarly):
        train.run(config(root, run, time_limit_minutes=1e-6, **settings))
    assert scores(run) == [] and not artifact.is_complete(run)
    train.run(config(root, run, **settings))
    assert [line["step"] for line in scores(run)] == [1] and artifact.is_complete(run)
    train.run(config(root, run, **settings))
    assert [line["step"] for line in scores(run)] == [1], "once"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"evaluation__tasks": ["no_such_task"]}, "there is no task 'no_such_task'"),
        ({"evaluation__tasks": ["chain_sums"]}, "did you mean chain_sum"),
        ({"evaluation__tasks": ["aime24"], "evaluation__data_dir": "/nowhere"}, "aime"),
        ({"task": "talk", "evaluation__without_chat_template": "refuse"}, "no chat template: add chat_template.jinja"),
        ({"evaluation__max_new_tokens": 120}, r"limit of 128 tokens"),
        ({"evaluation__temperature": 0}, "greedy completions would all be equal"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_training(root: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        train.run(config(root, root / "refused", **settings))
    assert not [path for path in (root / "refused").rglob("*") if path.is_file()]


def test_an_interval_without_checkpoints_is_refused(root: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation\.interval=2 must be a multiple of checkpoint\.save_interval=3: checkpoints answer"):
        config(root, root / "refused", evaluation__interval=2)


def test_a_dry_run_says_what_is_asked(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.dry_run(config(root, root / "dry"))
    assert "evaluation every 3 steps: sums (5 questions)" in capsys.readouterr().out


def test_what_an_evaluation_draws_and_sets_is_taken_back() -> None:
    def draw() -> list[float]:
        return [float(torch.rand(())), random.random(), float(np.random.random())]

    torch.use_deterministic_algorithms(True)
    try:
        with apart():
            inside = draw()
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert draw() == inside
