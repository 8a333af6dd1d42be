"""`prism launch`: what it shows, what it refuses, what it queues where Slurm's commands are played."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from played_slurm import play_slurm
from prism_command import prism

CHAIN = """
output = "runs/it's"

[[stage]]
name = "first"
stage = "stages_of_ours.own_stage"
nodes = 2
gpus = 2
hours = 1.5

[[stage]]
name = "second"
stage = "stages_of_ours.own_stage"
set = { source = "stage:first" }

[[stage]]
name = "aside"
stage = "stages_of_ours.own_stage"
after = ["first"]

[[stage]]
name = "last"
stage = "stages_of_ours.own_stage"
after = ["aside"]
set = { source = "stage:second" }
"""
SBATCH = r"""
[[ ! -e refuse ]] || { echo "sbatch: error: invalid partition" >&2; exit 1; }
number=$(($(cat number 2>/dev/null || echo 100) + 1))
echo "$number" > number
printf '%s|' "$@" >> submitted; echo >> submitted
echo "$number;cluster"
"""
SQUEUE = r"""
[[ ! -e away ]] || { echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1; }
for word in "$@"; do [[ ! -e "queued/${word#--jobs=}" ]] || echo "${word#--jobs=} RUNNING"; done
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    package = tmp_path / "importable/stages_of_ours"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copy(Path(__file__).parent / "own_stage.py", package)
    (tmp_path / "pipeline.toml").write_text(CHAIN)
    (tmp_path / "recipe.toml").write_text('output = "runs/one"\n')
    play_slurm(tmp_path / "bin", nodes=1, sbatch=SBATCH, squeue=SQUEUE)
    return tmp_path


def _launch(project: Path, *words: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    path = f"{project / 'bin'}:{os.environ['PATH']}"
    return prism("launch", *words, cwd=project, env={"PYTHONPATH": str(project / "importable"), "PATH": path, **(env or {})})


def _commands(project: Path) -> list[list[str]]:
    """What the played sbatch was given."""
    return [line.rstrip("|").split("|") for line in (project / "submitted").read_text().splitlines()]


def _finish(project: Path, name: str) -> None:
    """The stage's output, made by the stage itself."""
    set_source = {"second": 'source="runs/it\'s/first"', "last": 'source="runs/it\'s/second"'}
    words = [f'output="runs/it\'s/{name}"', *([set_source[name]] if name in set_source else [])]
    done = prism("stage", "stages_of_ours.own_stage", *words, cwd=project, env={"PYTHONPATH": str(project / "importable")})
    assert done.returncode == 0, done.stderr


def test_a_pipeline_becomes_a_chain_in_which_each_job_waits_for_what_it_needs(project: Path) -> None:
    done = _launch(project, "slurm", "pipeline.toml")
    assert done.returncode == 0, done.stderr
    folder = "runs/it's"
    assert _commands(project) == [
        ["--parsable", f"{folder}/first.sbatch"],
        ["--parsable", "--dependency=afterok:101", "--kill-on-invalid-dep=yes", f"{folder}/second.sbatch"],
        ["--parsable", "--dependency=afterok:101", "--kill-on-invalid-dep=yes", f"{folder}/aside.sbatch"],
        ["--parsable", "--dependency=afterok:103:102", "--kill-on-invalid-dep=yes", f"{folder}/last.sbatch"],
    ]
    assert "first: job 101, runs/it's/first.log" in done.stdout and "last: job 104 after 103, 102" in done.stdout
    script = (project / folder / "first.sbatch").read_text()
    assert f"#SBATCH --job-name={project.name}-first\n#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=2\n" in script
    assert "#SBATCH --gpus-per-node=2\n#SBATCH --time=01:30:00\n#SBATCH --signal=TERM@600\n" in script


def test_submitting_again_goes_on_at_the_stage_that_failed(project: Path) -> None:
    assert _launch(project, "slurm", "pipeline.toml").returncode == 0
    _finish(project, "first")
    (project / "runs/it's/second.failures").write_text("after nothing\n")
    (project / "submitted").unlink()
    (project / "queued").mkdir()
    (project / "queued/103").touch()  # `aside` is still in the queue
    done = _launch(project, "slurm", "pipeline.toml")
    assert done.returncode == 0, done.stderr
    assert "# first: skip, runs/it's/first is complete and unchanged" in done.stdout and "# aside: is job 103 already" in done.stdout
    assert _commands(project) == [
        ["--parsable", "runs/it's/second.sbatch"],
        ["--parsable", "--dependency=afterok:103:105", "--kill-on-invalid-dep=yes", "runs/it's/last.sbatch"],
    ]
    assert not (project / "runs/it's/second.failures").exists(), "failures before the mending do not count"

    (project / "submitted").unlink()
    (project / "away").touch()
    unsure = _launch(project, "slurm", "pipeline.toml")
    assert unsure.returncode == 1 and "squeue does not say whether job 105 still makes runs/it's/second" in unsure.stderr, unsure.stderr
    assert not (project / "submitted").exists(), "a job that may be there is not queued a second time"


def test_print_shows_the_scripts_and_commands_of_a_chain_that_bash_can_read_and_writes_nothing(project: Path) -> None:
    before = sorted(project.rglob("*"))
    shown = _launch(project, "slurm", "pipeline.toml", "--print", "--after", "7", env={"PYTHONDONTWRITEBYTECODE": "1"})
    assert shown.returncode == 0, shown.stderr
    assert [path for path in sorted(project.rglob("*")) if "__pycache__" not in str(path)] == before
    commands = re.findall(r"^job_\w+=.*$", shown.stdout, re.MULTILINE)
    quoted = "'runs/it'\"'\"'s/{}.sbatch'"
    assert commands == [
        f"job_first=$(sbatch --parsable --dependency=afterok:7 --kill-on-invalid-dep=yes {quoted.format('first')})",
        f"job_second=$(sbatch --parsable --dependency=afterok:$job_first --kill-on-invalid-dep=yes {quoted.format('second')})",
        f"job_aside=$(sbatch --parsable --dependency=afterok:$job_first --kill-on-invalid-dep=yes {quoted.format('aside')})",
        f"job_last=$(sbatch --parsable --dependency=afterok:$job_aside:$job_second --kill-on-invalid-dep=yes {quoted.format('last')})",
    ]
    subprocess.run(["bash", "-n"], input="\n".join(commands), text=True, check=True)
    scripts = re.findall(r"^# ----- .*?\n(#!/bin/bash\n.*?)^# -----$", shown.stdout, re.MULTILINE | re.DOTALL)
    assert len(scripts) == 4
    for script in scripts:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipe.toml"], "recipe.toml: its name begins with no stage, so say whose recipe it is: --stage train"),
        ([], "Missing argument"),
        (["pipeline.toml", "--nodes", "3"], "pipeline.toml is a pipeline, whose stages have their own keys and sizes; write --nodes into it"),
        (["pipeline.toml", "recipe.toml"], "takes one recipe or pipeline, got pipeline.toml, recipe.toml"),
        (["recipe.toml", "cuont=3", "--stage", "stages_of_ours.own_stage"], "unknown key cuont; did you mean count?"),
        (
            ["recipe.toml", "--stage", "merge", "--nodes", "2", "models=[{path='a',weight=0.5},{path='b',weight=0.5}]"],
            "nodes=2: a merge stage runs in one process; drop nodes",
        ),
        (["recipe.toml", "--stage", "stages_of_ours.own_stage", "--ranks", "4", "--gpus", "8"], "ranks=4 must be nodes*gpus = 1*8 = 8"),
        (
            ["recipe.toml", "--stage", "stages_of_ours.own_stage", "--ranks", "4", "parallel.tp=3"],
            "ranks=4 must be a multiple of parallel.tp*pp*cp = 3*1*1 = 3",
        ),
        (["recipe.toml", "--stage", "stages_of_ours.own_stage", "--nodes", "0"], "nodes=0: input should be greater than 0"),
        (["recipe.toml", "--stage", "stages_of_ours.own_stage", "--cluster", "gone.toml"], "gone.toml does not exist"),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_queued(project: Path, words: list[str], message: str) -> None:
    done = _launch(project, "slurm", *words)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (project / "submitted").exists() and not (project / "runs").exists()


def test_a_chain_with_a_job_that_the_cluster_would_never_start_is_not_begun(project: Path) -> None:
    (project / "cluster.toml").write_text('partition = "gpu"\n[partitions.gpu]\nmax_hours = 1\nneeds_account = true\n')
    refused = _launch(project, "slurm", "pipeline.toml", "--cluster", "cluster.toml")
    assert refused.returncode == 2
    assert "stage first: hours=1.5 is more than partition gpu allows (max_hours=1); try hours=1" in refused.stderr
    assert "stage last: account is missing: partition gpu takes no job without one" in refused.stderr
    assert not (project / "submitted").exists()
    capped = _launch(project, "slurm", "pipeline.toml", "--cluster", "cluster.toml", "--hours", "1", "--account", "lab", "--print")
    assert capped.returncode == 0 and capped.stdout.count("#SBATCH --time=01:00:00") == 4


def test_a_variable_to_pass_on_must_be_set_where_the_job_is_submitted(project: Path) -> None:
    (project / "cluster.toml").write_text('pass_env = ["PRISM_TEST_TOKEN"]\n')
    words = ("slurm", "pipeline.toml", "--cluster", "cluster.toml")
    refused = _launch(project, *words)
    assert refused.returncode == 2 and "pass_env names PRISM_TEST_TOKEN, which is not set here" in refused.stderr
    assert _launch(project, *words, env={"PRISM_TEST_TOKEN": "s3cret"}).returncode == 0
    assert not [path for path in project.rglob("*") if path.is_file() and "s3cret" in path.read_text(errors="replace")]


def test_what_sbatch_says_against_a_job_is_passed_on(project: Path) -> None:
    (project / "refuse").touch()
    refused = _launch(project, "slurm", "pipeline.toml")
    assert refused.returncode == 2 and "sbatch refused runs/it's/first.sbatch: sbatch: error: invalid partition" in refused.stderr
    (project / "bin/sbatch").unlink()
    gone = _launch(project, "slurm", "pipeline.toml", env={"PATH": "/nowhere"})
    assert gone.returncode == 2 and "sbatch is not on PATH: this machine is no login node" in gone.stderr


def test_an_output_that_is_out_of_date_is_not_written_over(project: Path) -> None:
    _finish(project, "first")
    (project / "pipeline.toml").write_text(CHAIN.replace("hours = 1.5", "hours = 1.5\nset = { count = 5 }"))
    refused = _launch(project, "slurm", "pipeline.toml")
    assert refused.returncode == 2 and "runs/it's/first is out of date: count was 3, now 5" in refused.stderr


def test_prism_run_has_one_machine(project: Path) -> None:
    (project / "pipeline.toml").write_text(CHAIN.replace("gpus = 2", "ranks = 4"))
    refused = prism("run", "pipeline.toml", cwd=project, env={"PYTHONPATH": str(project / "importable")})
    assert refused.returncode == 2
    assert "stage first: nodes=2\nprism run has this machine alone; queue the chain with prism launch slurm pipeline.toml" in refused.stderr


def test_local_prints_the_command_and_passes_a_ranks_refusal_on(project: Path) -> None:
    words = ("local", "recipe.toml", "--stage", "stages_of_ours.own_stage", "--ranks", "2")
    shown = _launch(project, *words, "--print")
    assert shown.returncode == 0 and "PYTHONSAFEPATH=1" in shown.stdout
    assert "PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT,SIGTERM,SIGUSR1,SIGUSR2 " in shown.stdout
    assert "-m torch.distributed.run --standalone --max-restarts 0 --nproc-per-node 2 -m megatron_prism stage stages_of_ours" in shown.stdout
    assert not (project / "runs").exists()
    refused = _launch(project, *words, "ending=refuse on rank 1")
    assert refused.returncode == 2 and "error: rank 1: rank 1 alone cannot count; its output: runs/one.log" in refused.stderr
