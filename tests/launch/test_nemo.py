"""Jobs as a nemo-run experiment. nemo-run has an environment of its own (`make nemo-test`); what needs it is skipped without it."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from prism_command import prism

from megatron_prism.errors import UserError
from megatron_prism.launch import nemo
from megatron_prism.launch.cluster import ClusterConfig
from megatron_prism.launch.job import Job

INSTALLED = importlib.util.find_spec("nemo_run") is not None
needs_nemo_run = pytest.mark.skipif(not INSTALLED, reason="nemo-run is not installed: the extra `launch`, make nemo-test")
TRAINER = os.environ.get("PRISM_TRAINING_PYTHON", "python")
"""the interpreter that has torch, beside nemo-run's environment"""

JOB = Job("train", Path("midtrain.toml"), ("steps=20",), ranks=16, nodes=2, gpus_per_node=8, hours=36.5, env={"A": "1"})
SLURM = {
    "account": "lab",
    "partition": "gpu",
    "container": "/img/prism.sqsh",
    "mounts": ("/data:/data",),
    "pass_env": ("WANDB_API_KEY",),
    "network_interface": "ib0",
    "setup": "module load cuda",
    "nemo": {"executor": "slurm", "host": "login1", "user": "me", "job_dir": Path("/home/me/nemo")},
}
SKY = {"nemo": {"executor": "skypilot", "accelerator": "H200", "infra": "k8s/lab"}, "setup": "pip install megatron-prism"}
CHAIN = """
output = "runs"

[[stage]]
name = "first"
stage = "counting.own_stage"
ranks = 2

[[stage]]
name = "second"
stage = "counting.own_stage"
set = { source = "stage:first" }
"""


@pytest.mark.skipif(INSTALLED, reason="nemo-run is installed")
def test_without_nemo_run_the_extra_to_install_is_named() -> None:
    with pytest.raises(UserError, match=r"megatron-prism\[launch\]"):
        nemo.task(Job("train"), ClusterConfig())


def test_the_settings_of_its_slurm_executor_are_these() -> None:
    kind, settings = nemo.executor_settings(JOB, ClusterConfig.model_validate(SLURM))
    assert kind == "SlurmExecutor"
    assert settings == {
        "account": "lab",
        "partition": "gpu",
        "time": "36:30:00",
        "nodes": 2,
        "ntasks_per_node": 8,
        "gpus_per_node": 8,
        "launcher": "torchrun",
        "container_image": "/img/prism.sqsh",
        "container_mounts": ["/data:/data"],
        "srun_args": [f"--container-workdir={Path.cwd()}", "--kill-on-bad-exit=1"],
        "additional_parameters": {"requeue": True},
        "retries": 3,
        "env_vars": {"A": "1", "GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib0", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
        "setup_lines": 'module load cuda\n: "${WANDB_API_KEY:?is not set; export it where the job is submitted}"',
        "tunnel": {"host": "login1", "user": "me", "job_dir": "/home/me/nemo"},
    }


def test_the_settings_of_its_skypilot_executor_are_these() -> None:
    kind, settings = nemo.executor_settings(JOB, ClusterConfig.model_validate(SKY))
    assert kind == "SkypilotExecutor"
    assert settings == {
        "infra": "k8s/lab",
        "gpus": "H200",
        "gpus_per_node": 8,
        "num_nodes": 2,
        "launcher": "torchrun",
        "retries": 3,
        "env_vars": {"A": "1", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
        "setup": "pip install megatron-prism",
    }


@pytest.mark.parametrize(
    ("job", "place", "message"),
    [
        (JOB, {}, "nodes=2: nemo-run's local executor has this machine alone"),
        (JOB, {"nemo": {"executor": "slurm"}}, "account is missing"),
        (Job("train"), {"nemo": {"executor": "slurm"}, "account": "lab"}, "hours is missing: nemo-run's own limit is ten minutes"),
        (JOB, {"nemo": {"executor": "skypilot"}}, "nemo.accelerator is missing"),
        (JOB, {"nemo": {"executor": "skypilot"}, "pass_env": ("HF_TOKEN",)}, "use SkyPilot's secrets"),
    ],
)
def test_what_nemo_run_would_take_for_something_else_is_refused(job: Job, place: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        nemo.executor_settings(job, ClusterConfig.model_validate(place))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "importable/counting").mkdir(parents=True)
    (tmp_path / "importable/counting/__init__.py").touch()
    shutil.copy(Path(__file__).parent / "own_stage.py", tmp_path / "importable/counting")
    (tmp_path / "pipeline.toml").write_text(CHAIN)
    (tmp_path / "cluster.toml").write_text(f'python = "{TRAINER}"\n')
    return tmp_path


def _launch(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {"PYTHONPATH": f"{project / 'importable'}:{Path(__file__).parents[2]}", "NEMORUN_HOME": str(project / "home")}
    return prism("launch", "nemo", "pipeline.toml", "--cluster", "cluster.toml", *words, cwd=project, env=env, timeout=250)


def test_print_shows_the_executor_and_the_command_of_every_stage(project: Path) -> None:
    shown = _launch(project, "--print")
    assert shown.returncode == 0, shown.stderr
    variables = '  env_vars = {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}\n  task = '
    run = f"{TRAINER} -m torch.distributed.run --standalone --max-restarts 0 --nproc-per-node 2 -m megatron_prism stage counting.own_stage"
    assert shown.stdout == (
        f"# ----- first\nLocalExecutor\n{variables}{run} 'output=\"runs/first\"'\n"
        f"# ----- second, after first\nLocalExecutor\n{variables}{TRAINER} -m megatron_prism stage counting.own_stage "
        "'source=\"runs/first\"' 'output=\"runs/second\"'\n"
    )


@needs_nemo_run
@pytest.mark.slow
def test_its_local_executor_runs_a_chain_on_every_rank_and_what_is_finished_is_skipped(project: Path) -> None:
    done = _launch(project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (project / "runs/first/COMPLETE").exists() and (project / "runs/second/COMPLETE").exists()
    assert "rank 0" in done.stdout + done.stderr and "rank 1" in done.stdout + done.stderr
    again = _launch(project)
    assert again.returncode == 0 and "rank 0" not in again.stdout + again.stderr


@needs_nemo_run
@pytest.mark.slow
def test_a_stage_that_fails_fails_the_experiment(project: Path) -> None:
    (project / "pipeline.toml").write_text(CHAIN.replace("ranks = 2", 'set = { ending = "raise" }'))
    assert _launch(project).returncode == 1
    assert not (project / "runs/second").exists()


@needs_nemo_run
def test_its_slurm_executor_takes_the_settings() -> None:
    place = ClusterConfig.model_validate(SLURM)
    executor = nemo.executor(JOB, place)
    assert (executor.nnodes(), executor.nproc_per_node(), executor.time, executor.tunnel.host) == (2, 8, "36:30:00", "login1")
    task = nemo.task(JOB, place)
    assert (task.entrypoint, task.m, task.path, task.args) == ("python", True, "megatron_prism", ["train", "midtrain.toml", "steps=20"])
