"""`prism run`: order, skipping, staleness, failures; with a stage of one's own in the place of the slow ones, run by the real command."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from prism_command import prism

from megatron_prism import artifact

CHAIN = """
output = "runs"

[[stage]]
name = "first"
stage = "stages_of_ours.own_stage"
recipe = "recipes/first.toml"

[[stage]]
name = "second"
stage = "stages_of_ours.own_stage"
set = { source = "stage:first", count = 2 }
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a pipeline of two one-process stages."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/first.toml").write_text("count = 3\n")
    (tmp_path / "pipeline.toml").write_text(CHAIN)
    package = tmp_path / "importable/stages_of_ours"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copy(Path(__file__).parent / "own_stage.py", package)
    return tmp_path


def _run(project: Path, *options: str, timeout: float = 120):
    return prism("run", "pipeline.toml", *options, cwd=project, env={"PYTHONPATH": str(project / "importable")}, timeout=timeout)


def _pids(output: str) -> set[int]:
    return {int(pid) for pid in re.findall(r"pid (\d+)", output)}


def _replace(project: Path, old: str, new: str) -> None:
    path = project / "pipeline.toml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_a_second_run_skips_what_is_done_and_the_stages_share_a_process(project: Path) -> None:
    first = _run(project)
    assert first.returncode == 0, first.stderr
    assert "[1/2] first: done" in first.stdout and "[2/2] second: done" in first.stdout and "2 run, 0 skipped" in first.stdout
    assert len(_pids(first.stdout)) == 1, "both stages run in one worker process"
    provenance = json.loads((project / "runs/second/provenance.json").read_text())
    assert provenance["parents"] == {"runs/first": artifact.digest(project / "runs/first")}
    assert provenance["command"][:3] == ["prism", "stage", "stages_of_ours.own_stage"], "the command that makes this stage alone"
    assert "counts 3" in (project / "runs/first.log").read_text() and "counts 3" not in (project / "runs/second.log").read_text()

    again = _run(project)
    assert again.returncode == 0 and "0 run, 2 skipped" in again.stdout and "counts" not in again.stdout


def test_a_changed_recipe_stops_before_anything_runs_and_remake_makes_it_and_its_children_again(project: Path) -> None:
    assert _run(project).returncode == 0
    (project / "recipes/first.toml").write_text("count = 4\n")
    stopped = _run(project)
    assert stopped.returncode == 2
    assert (
        "count was 3, now 4" in stopped.stderr
        and "stage second: runs/second is out of date: its input runs/first will be made anew" in stopped.stderr
    )
    assert "counts" not in stopped.stdout

    remade = _run(project, "--remake")
    assert remade.returncode == 0 and "2 run, 0 skipped" in remade.stdout and "counts 4" in remade.stdout


def test_a_child_is_made_again_when_its_parent_was(project: Path) -> None:
    assert _run(project).returncode == 0
    shutil.rmtree(project / "runs/first")
    plan = _run(project, "--dry-run")
    assert plan.returncode == 0 and re.search(r"second .*stop: out of date", plan.stdout)
    remade = _run(project, "--remake")
    assert remade.returncode == 0 and "2 run" in remade.stdout


def test_a_dry_run_shows_the_plan_and_writes_nothing(project: Path) -> None:
    before = sorted(project.rglob("*"))
    plan = _run(project, "--dry-run")
    assert plan.returncode == 0, plan.stderr
    assert re.search(r"first +stages_of_ours.own_stage +- +recipes/first.toml +runs/first +run", plan.stdout)
    assert [path for path in sorted(project.rglob("*")) if "__pycache__" not in str(path)] == before


@pytest.mark.parametrize(
    ("ending", "status", "words"),
    [
        ("raise", 1, "RuntimeError: the numbers ran out"),
        ("refuse", 2, "count=3 must be prime and even; try count=2"),
        ("exit", 7, "exit status 7"),
        ("kill", 137, "ended by SIGKILL"),
        ("early", 75, "run the pipeline again to continue"),
    ],
)
def test_a_failure_stops_the_chain_and_says_where_to_look(project: Path, ending: str, status: int, words: str) -> None:
    (project / "recipes/first.toml").write_text(f'ending = "{ending}"\n')
    failed = _run(project)
    assert failed.returncode == status, failed.stderr
    assert "error: stage first failed after" in failed.stderr and words in failed.stderr
    assert "runs/first.log" in failed.stderr and "counts 3" in (project / "runs/first.log").read_text()
    assert not (project / "runs/second").exists()
    assert "Traceback" not in failed.stderr
    if ending == "raise":
        assert "Traceback" in (project / "runs/first.log").read_text(), "the log holds the whole story"

    (project / "recipes/first.toml").write_text("")
    assert _run(project).returncode == 0, "the same command continues an unfinished chain"


def test_a_stage_on_many_ranks_runs_under_torchrun_between_one_process_stages(project: Path) -> None:
    _replace(project, 'recipe = "recipes/first.toml"', 'recipe = "recipes/first.toml"\nranks = 2\nset.parallel.tp = 2')
    done = _run(project)
    assert done.returncode == 0, done.stderr
    assert "first: run stages_of_ours.own_stage on 2 ranks" in done.stdout
    assert {"rank 0", "rank 1"} == set(re.findall(r"rank [01]", (project / "runs/first.log").read_text()))


@pytest.mark.parametrize(
    ("ending", "status", "words"),
    [
        ("refuse", 2, "failed after .*: count=3 must be prime and even; try count=2"),
        ("refuse on rank 1", 2, "failed after .*: rank 1: rank 1 alone cannot count"),
        ("exit", 7, "exit status 7"),
        ("kill", 137, "ended by SIGKILL"),
    ],
)
def test_the_exit_status_of_a_rank_is_passed_on_and_its_message_is_said_once(project: Path, ending: str, status: int, words: str) -> None:
    _replace(project, 'recipe = "recipes/first.toml"', f'ranks = 2\nset.ending = "{ending}"')
    failed = _run(project)
    assert failed.returncode == status, failed.stderr + failed.stdout
    assert re.search(words, failed.stderr)
    if ending == "refuse":
        assert failed.stdout.count("must be prime and even") == 1, "what every rank would say is said by rank 0"


def test_everything_wrong_in_a_pipeline_is_said_at_once_before_anything_runs(project: Path) -> None:
    (project / "recipes/first.toml").write_text("cuont = 3\n")
    (project / "pipeline.toml").write_text(
        (project / "pipeline.toml").read_text()
        + '[[stage]]\nname = "third"\nstage = "stages_of_ours.own_stage"\nset = { source = "stage:frist", count = "many" }\n'
        + '[[stage]]\nname = "fourth"\nstage = "stages_of_ours.own_stage"\nranks = 3\nset = { parallel.tp = 2 }\n'
        + '[[stage]]\nname = "fifth"\nstage = "trian"\n'
        + '[[stage]]\nname = "sixth"\nstage = "stages_of_ours.own_stage"\nset = { output = "runs/second" }\n'
    )
    refused = _run(project)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    for words in (
        "stage first: recipes/first.toml: unknown key cuont; did you mean count?",
        "stage third: 'stage:frist' names no stage of this pipeline; did you mean stage:first?",
        "stage fourth: ranks=3 must be a multiple of parallel.tp*pp*cp = 2*1*1 = 2; try ranks=2",
        "stage fifth: there is no stage 'trian'; did you mean train?",
        "two stages have the output",
    ):
        assert words in refused.stderr, refused.stderr
    assert not (project / "runs").exists()


def test_a_reference_to_a_later_stage_is_refused(project: Path) -> None:
    _replace(project, 'recipe = "recipes/first.toml"', 'set = { source = "stage:second" }')
    refused = _run(project)
    assert refused.returncode == 2 and "'stage:second' names a stage that does not come before this one" in refused.stderr


def test_stopping_a_pipeline_stops_its_ranks(project: Path) -> None:
    (project / "importable/stages_of_ours/sleeper.py").write_text(
        "from stages_of_ours.own_stage import *\nimport os, time\n"
        "def run(cfg):\n    open(f'pid{os.environ[\"RANK\"]}', 'w').write(str(os.getpid()))\n    time.sleep(300)\n"
    )
    _replace(project, 'stages_of_ours.own_stage"\nrecipe = "recipes/first.toml"', 'stages_of_ours.sleeper"\nranks = 2')
    env = {**os.environ, "PYTHONPATH": str(project / "importable")}
    process = subprocess.Popen([sys.executable, "-m", "megatron_prism", "run", "pipeline.toml"], cwd=project, env=env)
    try:
        deadline = time.monotonic() + 90
        files = [project / "pid0", project / "pid1"]
        while not all(file.exists() and file.read_text() for file in files):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.2)
        ranks = [psutil.Process(int(file.read_text())) for file in files]
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        _gone, left = psutil.wait_procs(ranks, timeout=60)
        assert not left, "torchrun hears of its parent's death and ends its ranks"
    finally:
        process.kill()
