"""`prism launch slurm` on a real Slurm of two nodes on this machine: a job is told to stop, a node is lost in mid step, a chain is mended."""

import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w
from loopback_slurm import LoopbackSlurm, loopback_slurm, obstacle
from prism_command import prism
from training import from_random, metrics, recipe

from megatron_prism.config import merge

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))]
CLUSTER = """
python = "{python}"
network_interface = "lo"
timeout_minutes = 2
save_minutes = 1
starter = "{starter}"
requeues = 1
"""
COUNTING = """
output = "runs"

[[stage]]
name = "first"
stage = "stages_of_ours.own_stage"
nodes = 2
ranks = 2

[[stage]]
name = "second"
stage = "stages_of_ours.own_stage"
set = { source = "stage:first", ending = "raise" }

[[stage]]
name = "third"
stage = "stages_of_ours.own_stage"
set = { source = "stage:second" }
"""
STEPS = 18


@pytest.fixture(scope="module")
def cluster() -> Iterator[LoopbackSlurm]:
    with loopback_slurm(nodes=2) as running:
        yield running


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder whose name a shell would take apart."""
    folder = tmp_path / "it's a 100% $HOME"
    package = folder / "importable/stages_of_ours"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copy(Path(__file__).parent / "own_stage.py", package)
    return folder


def _launch(project: Path, cluster: LoopbackSlurm, *words: str, starter: str = "srun") -> dict[str, str]:
    """`prism launch slurm`; the numbers of the jobs by the names of their stages."""
    (project / "cluster.toml").write_text(CLUSTER.format(python=sys.executable, starter=starter))
    env = {**cluster.variables, "PYTHONPATH": str(project / "importable"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    done = prism("launch", "slurm", *words, "--cluster", "cluster.toml", cwd=project, env=env)
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"^(\w+): job (\d+)", done.stdout, re.MULTILINE))


def _wait_for_step(cluster: LoopbackSlurm, run: Path, step: int) -> None:
    log = run / "metrics.jsonl"
    cluster.wait_for(lambda: log.exists() and f'"step": {step},' in log.read_text(), 200, f"step {step}")
    assert metrics(run)[-1]["step"] < STEPS, "what comes now comes in the middle"


def _wait_until_queued_again(cluster: LoopbackSlurm, number: str, restarts: int = 1) -> None:
    cluster.wait_for(
        lambda: [cluster.job(number)[key] for key in ("Restarts", "JobState")] == [str(restarts), "PENDING"], 150, f"job {number} to be queued again"
    )


def _start_now(cluster: LoopbackSlurm, number: str) -> None:
    """Slurm by itself lets two minutes pass before a job that was queued again; what is left of it must have ended before it starts."""
    cluster.wait_for(cluster.is_at_rest, 60, "what is left of the job to end")
    time.sleep(1)
    cluster.ask("scontrol", "update", f"JobId={number}", "StartTime=now")


def _ended(cluster: LoopbackSlurm, number: str, seconds: float) -> str:
    """The state in which a job ends."""
    cluster.wait_for(lambda: cluster.job(number)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), seconds, f"job {number}")
    return cluster.job(number)["JobState"]


@pytest.mark.skipif("PRISM_SLURM_TEST" not in os.environ, reason="minutes long: make slurm-test runs it")
@pytest.mark.timeout(900)
def test_a_job_that_was_told_to_stop_and_then_lost_a_node_ends_with_the_losses_of_an_unbroken_run(project: Path, cluster: LoopbackSlurm) -> None:
    words = recipe(project, Path("runs/broken"), steps=STEPS, global_batch=32, checkpoint__save_interval=3, **from_random(project))
    (project / "train.toml").write_text(tomli_w.dumps(merge(None, words)))
    job = _launch(project, cluster, "train.toml", "--nodes", "2", "--ranks", "2")["train"]
    broken = project / "runs/broken"

    _wait_for_step(cluster, broken, 4)
    cluster.ask("scancel", "--signal=TERM", job)  # what --signal=TERM@... does before the time limit: to every step, not to the script
    _wait_until_queued_again(cluster, job)
    stopped = metrics(broken)[-1]["step"]
    assert (broken / f"checkpoints/step_{stopped:08d}/COMPLETE").exists(), "it saved before it stopped"
    _start_now(cluster, job)

    _wait_for_step(cluster, broken, stopped + 5)
    cluster.lose_node("n2")
    _wait_until_queued_again(cluster, job, restarts=2)
    cluster.return_node("n2")
    _start_now(cluster, job)

    unbroken = prism("launch", "local", "train.toml", "output=runs/unbroken", "--ranks", "2", cwd=project, timeout=200)
    assert unbroken.returncode == 0, unbroken.stdout + unbroken.stderr
    expected = {line["step"]: (line["loss"], line["grad_norm"]) for line in metrics(project / "runs/unbroken")}
    # Slurm was once seen to end the new start for the old one's lost node: the job is then queued once more, for two minutes
    assert _ended(cluster, job, 400) == "COMPLETED", (project / "runs/broken.log").read_text()[-3000:]
    first, *later = re.findall(r"from step (\d+) of", (project / "runs/broken.log").read_text())
    assert first == "0" and len(later) >= 2 and "0" not in later, "it went on, it did not begin anew"
    lines = metrics(broken)
    assert {line["step"] for line in lines} == expected.keys() == set(range(1, STEPS + 1))
    assert [(line["loss"], line["grad_norm"]) for line in lines] == [expected[line["step"]] for line in lines]


@pytest.mark.skipif("PRISM_SLURM_TEST" not in os.environ, reason="minutes long: make slurm-test runs it")
@pytest.mark.timeout(600)
def test_a_job_that_meets_its_time_limit_is_queued_again_with_those_that_wait_for_it_and_one_that_is_cancelled_is_not(
    project: Path, cluster: LoopbackSlurm
) -> None:
    deaf = COUNTING.replace("ranks = 2", 'ranks = 2\nhours = 0.0167\nset = { ending = "deaf" }').replace(', ending = "raise"', "")
    (project / "pipeline.toml").write_text(deaf)
    jobs = _launch(project, cluster, "pipeline.toml")
    _wait_until_queued_again(cluster, jobs["first"])
    log = (project / "runs/first.log").read_text()
    assert "DUE TO TIME LIMIT" in log and "status 143 at bytes" in log and "failure 1 without progress, of 2 that end this job" in log
    assert cluster.job(jobs["second"])["JobState"] == "PENDING" == cluster.job(jobs["third"])["JobState"]

    second = cluster.ask("sbatch", "--parsable", f"--chdir={project}", "--time=1", str(project / "runs/first.sbatch")).strip()
    assert _ended(cluster, second, 60) == "FAILED"
    assert f"error: job {jobs['first']} makes runs/first already" in (project / "runs/first.log").read_text()

    _start_now(cluster, jobs["first"])
    cluster.wait_for(lambda: (project / "runs/first.log").read_text().count("rank 0 pid") == 6, 60, "the second session")
    cluster.ask("scancel", jobs["first"])
    assert _ended(cluster, jobs["first"], 60) == "CANCELLED"
    assert cluster.job(jobs["first"])["Restarts"] == "1"


@pytest.mark.timeout(400)
def test_a_chain_stops_where_a_stage_fails_and_goes_on_there_when_it_was_mended(project: Path, cluster: LoopbackSlurm) -> None:
    (project / "pipeline.toml").write_text(COUNTING)
    jobs = _launch(project, cluster, "pipeline.toml", starter="torchrun")
    assert list(jobs) == ["first", "second", "third"]
    assert _ended(cluster, jobs["first"], 150) == "COMPLETED", (project / "runs/first.log").read_text()
    assert {"rank 0", "rank 1"} == set(re.findall(r"rank [01]", (project / "runs/first.log").read_text()))
    _wait_until_queued_again(cluster, jobs["second"])
    _start_now(cluster, jobs["second"])
    assert _ended(cluster, jobs["second"], 60) == "FAILED", "not a second time from the same place: requeues = 1"
    assert (project / "runs/second.log").read_text().count("RuntimeError: the numbers ran out") == 2
    assert _ended(cluster, jobs["third"], 60) == "CANCELLED", "what can never start is not left waiting"

    (project / "pipeline.toml").write_text(COUNTING.replace(', ending = "raise"', ""))
    again = _launch(project, cluster, "pipeline.toml")
    assert list(again) == ["second", "third"], "the first stage is done"
    assert _ended(cluster, again["third"], 60) == "COMPLETED", (project / "runs/third.log").read_text()
    assert (project / "runs/second/COMPLETE").exists() and (project / "runs/third/COMPLETE").exists()
