"""`prism status` of chains and of the other stages' outputs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prism_command import prism
from report_cases import make, pipeline, scored

from megatron_prism import artifact
from megatron_prism.evals.responses import ResponseFolder
from megatron_prism.status import text
from megatron_prism.status.command import look, one_output

CHAIN = """
output = "runs"

[[stage]]
name = "first"
stage = "counting.own_stage"
set = { count = 3 }

[[stage]]
name = "second"
stage = "counting.own_stage"
set = { source = "stage:first", count = 2, ending = "ENDING" }

[[stage]]
name = "third"
stage = "counting.own_stage"
set = { source = "stage:second" }
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A chain of three stages of one's own."""
    package = tmp_path / "importable" / "counting"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    source = (Path(__file__).parents[1] / "launch" / "own_stage.py").read_text()
    (package / "own_stage.py").write_text(
        source.replace('if ending == "exit":', 'if ending == "wait":\n        __import__("time").sleep(60)\n    if ending == "exit":')
    )
    return tmp_path


def _chain(project: Path, ending: str) -> dict[str, str]:
    (project / "pipeline.toml").write_text(CHAIN.replace("ENDING", ending))
    return {**os.environ, "PYTHONPATH": str(project / "importable"), "PYTHONSAFEPATH": "1"}


def _states(found) -> list[tuple[str, str]]:
    return [(part.name, part.state) for part in found.parts]


def test_a_stage_that_failed_and_those_that_wait_for_it_are_named(project):
    env = _chain(project, "refuse")
    assert prism("run", "pipeline.toml", cwd=project, env=env).returncode == 2
    found = look(project / "runs", time.time())
    assert (found.state, found.exit, found.done, found.total) == ("failed", 3, 1, 3)
    assert _states(found) == [("first", "finished"), ("second", "failed"), ("third", "waiting")]
    assert "status 2" in found.parts[1].why and "prime and even" in found.parts[1].why and "second.log" in found.parts[1].why
    _chain(project, "well")
    assert prism("run", "pipeline.toml", cwd=project, env=env).returncode == 0
    done = prism("status", "runs", cwd=project)
    assert done.returncode == 0 and "3 of 3 stages" in done.stdout and done.stdout.count("finished") == 4


def test_a_chain_runs_while_its_runner_does_and_is_dead_when_it_was_killed(project):
    env = _chain(project, "wait")
    with subprocess.Popen(
        [sys.executable, "-m", "megatron_prism", "run", "pipeline.toml"], cwd=project, env=env, stdout=subprocess.PIPE, text=True
    ) as running:
        for line in running.stdout:
            if "counts 2" in line and (project / "runs" / "second" / "provenance.json").is_file():
                break
        found = look(project / "runs", time.time() + 100_000)  # however long it computes: its runner is there
        assert _states(found) == [("first", "finished"), ("second", "running"), ("third", "waiting")] and found.state == "running"
        running.send_signal(signal.SIGKILL)
        running.wait()
    found = look(project / "runs", time.time())
    assert _states(found)[1] == ("second", "dead") and found.exit == 3 and "prism run" in found.parts[1].why


def test_without_a_record_the_outputs_stand_for_the_stages(tmp_path):
    found = look(pipeline(tmp_path), time.time())
    assert {name for name, _ in _states(found)} == {"data", "base", "midtrain", "rl", "evaluate"} and found.state == "finished"
    printed = text.block(found)
    assert "2,000 tokens" in printed and "reward" in printed and "loss" in printed


def test_a_chain_that_nobody_runs_is_stopped(tmp_path):
    scored(tmp_path / "evaluate", [])
    record = {"stages": [{"name": "evaluate", "output": "evaluate"}, {"name": "report", "output": "report", "stage": "report"}]}
    artifact.write_atomic(tmp_path / "pipeline.json", json.dumps(record))
    found = look(tmp_path, time.time())
    assert (found.state, found.exit) == ("stopped", 4) and _states(found)[1] == ("report", "waiting")


def test_an_evaluation_shows_its_scores_and_what_is_in_work(tmp_path):
    finished = one_output(scored(tmp_path / "done", []), time.time())
    assert finished.facts["scores"]["midtrained"] == {"tasks": {"chain_sum": 0.5, "gcd": 0.5}, "perplexity": {"math": 10.0}}
    models = [{"name": "base", "path": "b"}, {"name": "rl", "path": "r"}]
    folder = make(
        tmp_path / "going",
        "evaluate",
        files={"scores.json": {"models": {"base": {"tasks": {"gcd": {"accuracy": 0.25}}}}}},
        finished=False,
        models=models,
    )
    work = ResponseFolder(folder, "rl", "gcd")
    work.claim({"n": 1})
    work.parts.mkdir(parents=True)
    found = one_output(folder, time.time())
    assert (found.state, found.done, found.total) == ("running", 1, 2) and found.facts["in_work"] == {"rl": ["gcd"]}
    assert "gcd 25.0 %" in text.block(found) and one_output(folder, time.time() + 7200).state == "dead"
