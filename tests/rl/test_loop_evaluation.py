"""`[evaluation]` in an RL run: checkpoints answer at the interval, the run stays what it is, and one that is resumed owes what was not asked."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import rl_runs
from training import differing, final_state

from megatron_prism import artifact
from megatron_prism.config import load_recipe
from megatron_prism.engine import checkpoint, run_folder
from megatron_prism.rl.recipe import RLConfig
from megatron_prism.stages import rl

TASK = 'name = "sums"\ndomain = "math"\ndataset = "chain_sum"\nnum_questions = 3\nmax_new_tokens = 6\ntemperature = 1.0\nn = 2\n'


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = rl_runs.make_inputs(tmp_path_factory.mktemp("rl_evaluation"))
    (folder / "sums.toml").write_text(TASK)
    return folder


def config(root: Path, output: Path, asks: bool = True) -> RLConfig:
    words = rl_runs.recipe(root, output, steps=4, checkpoint__save_interval=2, checkpoint__keep_last=None)
    evaluation = [f'evaluation.tasks=["{root / "sums.toml"}"]', "evaluation.interval=2", "evaluation.grading_workers=0"]
    return load_recipe(None, [*words, *(evaluation if asks else [])], RLConfig)


def evaluations(run: Path) -> list[dict[str, Any]]:
    """The lines of evaluations, without what the clock says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line.keys() - {"time", "evaluation/seconds"}} for line in lines if "evaluation/seconds" in line]


@pytest.fixture(scope="module")
def unbroken(root: Path) -> Path:
    return rl.run(config(root, root / "unbroken"))


def test_the_checkpoints_of_the_interval_answer_and_the_run_is_what_it_is_without(root: Path, unbroken: Path) -> None:
    found = evaluations(unbroken)
    assert [line["step"] for line in found] == [2, 4] and all("evaluation/sums" in line for line in found)
    without = rl.run(config(root, root / "without", asks=False))
    assert evaluations(without) == [] and rl_runs.numbers(without) == rl_runs.numbers(unbroken)
    assert differing(final_state(without), final_state(unbroken)) == []


def test_a_run_that_died_before_an_evaluation_makes_it_first_and_goes_on_as_if_it_had_not(root: Path, unbroken: Path) -> None:
    """The folder as kill -9 leaves it in the evaluation of step 2."""
    run = shutil.copytree(unbroken, root / "killed")
    (run / artifact.COMPLETE).unlink()
    checkpoint.remove(run_folder.step_folder(run, 4))
    shutil.rmtree(run / "evaluation" / "responses")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("".join(line + "\n" for line in lines if "evaluation/seconds" not in line and '"step": 4' not in line))
    rl.run(config(root, run))
    assert evaluations(run) == evaluations(unbroken)
    assert rl_runs.numbers(run) == rl_runs.numbers(unbroken) and differing(final_state(run), final_state(unbroken)) == []
