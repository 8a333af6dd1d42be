"""The sbatch script: its whole text, that bash reads it, and that it starts the ranks when srun and scontrol are played by small scripts.

A real Slurm runs it in test_slurm_loopback.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from played_slurm import play_slurm

from megatron_prism.errors import UserError
from megatron_prism.launch.cluster import ClusterConfig
from megatron_prism.launch.job import Job
from megatron_prism.launch.slurm import sbatch_script

SCRIPT = (Path(__file__).parent / "midtrain.sbatch").read_text()
"""the script in which srun starts the ranks, as users read it"""
START = SCRIPT[SCRIPT.index("srun --ntasks-per-node=8") :]
TORCHRUN = """\
srun --ntasks-per-node=1 --kill-on-bad-exit=1 --cpus-per-task=64 --mpi=none \\
  python \\
    -m torch.distributed.run \\
    --nnodes "$SLURM_NNODES" \\
    --rdzv-backend c10d \\
    --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" \\
    --rdzv-id "$SLURM_JOB_ID" \\
    --max-restarts 0 \\
    --nproc-per-node 8 \\
    -m megatron_prism train 'recipes/my run.toml' steps=200
) &
wait $!  # in the background, so that this script hears what Slurm says to it
"""
FT_LAUNCHER = TORCHRUN.replace("--max-restarts 0", "--max-restarts 3").replace(
    "    -m torch.distributed.run \\\n",
    "    -m nvidia_resiliency_ext.fault_tolerance.launcher \\\n"
    "    --ft-initial-rank-heartbeat-timeout 1000000000 \\\n    --ft-rank-heartbeat-timeout 1000000000 \\\n",
)
OF_TORCHRUN = {
    "--ntasks-per-node=8\n": "--ntasks-per-node=1\n",
    "--cpus-per-task=8\n": "--cpus-per-task=64\n",
    "export PRISM_SAVE_SECONDS=600\n": "export PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT,SIGTERM,SIGUSR1,SIGUSR2\nexport PRISM_SAVE_SECONDS=570\n",
    "export PYTHONSAFEPATH=1\n": "export PYTHONSAFEPATH=1\nexport TORCH_ELASTIC_SHUTDOWN_TIMEOUT=570\n",
}
JOB = Job("train", Path("recipes/my run.toml"), ("steps=200",), ranks=16, nodes=2, gpus_per_node=8, hours=36.5, env={"NCCL_DEBUG": "WARN"})
PLACE = ClusterConfig(
    account="lab",
    partition="gpu",
    cpus_per_node=64,
    setup="module load cuda",
    venv=Path("/shared/venv"),
    pass_env=("WANDB_API_KEY",),
    network_interface="ib0",
    timeout_minutes=20,
    sbatch=("--constraint=h200",),
    srun=("--mpi=none",),
)
STAGE = """
import os
from pathlib import Path
from megatron_prism.config import Block
from megatron_prism.errors import StoppedEarly, UserError

class Config(Block):
    output: Path
    ending: str = "well"

def parents(cfg): return []
def dry_run(cfg): pass

def run(cfg):
    e = os.environ
    cfg.output.mkdir(parents=True, exist_ok=True)
    (cfg.output / e["RANK"]).write_text(f"{e['WORLD_SIZE']} {e['LOCAL_RANK']} {e['LOCAL_WORLD_SIZE']} {e['OMP_NUM_THREADS']} {e['MASTER_ADDR']}")
    if cfg.ending == "refuse":
        raise UserError("count must be prime and even")
    if cfg.ending == "stop":
        raise StoppedEarly("told to stop")
    if cfg.ending == "raise":
        raise RuntimeError("the numbers ran out")
    if cfg.ending == "well":
        (cfg.output / "COMPLETE").touch()
"""
ODD = 'it\'s $HOME `x` "q" 100% \\ #1 ünï'


def test_the_script_in_which_srun_starts_the_ranks_is_this_text_and_bash_reads_it() -> None:
    script = sbatch_script(JOB, PLACE, "midtrain", Path("runs/my run"))
    assert script == SCRIPT
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(("starter", "started"), [("torchrun", TORCHRUN), ("ft_launcher", FT_LAUNCHER)])
def test_the_script_in_which_torchrun_or_its_kin_starts_the_ranks_is_this_text_and_bash_reads_it(starter: str, started: str) -> None:
    script = sbatch_script(JOB, PLACE.model_copy(update={"starter": starter}), "midtrain", Path("runs/my run"))
    expected = SCRIPT.removesuffix(START)
    for before, after in OF_TORCHRUN.items():
        assert expected.count(before) == 1
        expected = expected.replace(before, after)
    assert script == expected + started
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_a_stage_of_one_process_starts_it_alone_in_a_container() -> None:
    place = ClusterConfig(container="/img/my prism.sqsh", mounts=("/data:/data", "/models:/models:ro"))
    script = sbatch_script(Job("merge", Path("merge.toml")), place, "merge", Path("runs/merged"))
    container = f"'--container-image=/img/my prism.sqsh' --container-workdir={Path.cwd()} --container-mounts=/data:/data,/models:/models:ro"
    start = f"srun --ntasks-per-node=1 --kill-on-bad-exit=1 {container} \\\n  python \\\n    -m megatron_prism merge merge.toml\n) &\nwait $!"
    assert start in script
    assert "MASTER_ADDR" not in script and "--time" not in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder of an odd name with a stage of its own on the path."""
    folder = tmp_path / ODD
    package = folder / "importable/tally"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "stage.py").write_text(STAGE)
    return folder


def _run(project: Path, starter: str = "srun", ending: str = "well", ranks: int = 4) -> subprocess.CompletedProcess[str]:
    """The script of a job on two nodes, run by bash where srun is played."""
    output = project / "runs" / ODD
    output.parent.mkdir(exist_ok=True)
    job = Job("tally.stage", overrides=(f"output='''{output}'''", f'ending="{ending}"'), ranks=ranks, nodes=2)
    place = ClusterConfig(python=sys.executable, cpus_per_node=2, starter=starter, requeues=1)
    script = sbatch_script(job, place, ODD, output)
    env = {**os.environ, **play_slurm(project / "bin", nodes=2), "PYTHONPATH": str(project / "importable")}
    return subprocess.run(["bash", "-s"], input=script, text=True, env=env, cwd=project, capture_output=True, timeout=150, check=False)


@pytest.mark.parametrize("starter", ["srun", "torchrun"])
def test_the_script_starts_every_rank_of_every_node_whatever_the_paths_are(project: Path, starter: str) -> None:
    done = _run(project, starter)
    assert done.returncode == 0, done.stderr
    found = {path.name: path.read_text().split()[:4] for path in (project / "runs" / ODD).iterdir() if path.name != "COMPLETE"}
    assert found == {rank: ["4", local, "2", "1"] for rank, local in zip("0123", "0101", strict=True)}
    if starter == "srun":
        assert (project / "runs" / ODD / "0").read_text().endswith(" 127.0.0.1"), "the address by which Slurm reaches the first node"
    assert not (project / "requeued").exists() and {path.name for path in (project / "runs").iterdir()} == {ODD, f"{ODD}.job"}


@pytest.mark.parametrize("starter", ["srun", "torchrun"])
def test_told_to_stop_is_status_75_whatever_those_answer_who_started_the_ranks(project: Path, starter: str) -> None:
    stopped = _run(project, starter, ending="stop", ranks=2)
    assert stopped.returncode == 75 and "status 75: queued again" in stopped.stderr and "without progress" not in stopped.stderr
    assert (project / "requeued").read_text() == "4711\n"


def test_a_stage_that_raises_is_queued_again(project: Path) -> None:
    failed = _run(project, ending="raise", ranks=2)
    assert failed.returncode == 1 and "the numbers ran out" in failed.stderr and "failure 1 without progress, of 2" in failed.stderr
    assert (project / "requeued").read_text() == "4711\n"


@pytest.mark.parametrize("starter", ["srun", "torchrun"])
def test_bad_input_is_status_2_and_never_queued_again(project: Path, starter: str) -> None:
    refused = _run(project, starter, ending="refuse", ranks=2)
    assert refused.returncode == 2 and "count must be prime and even" in refused.stderr
    assert not (project / "requeued").exists()


def test_a_variable_that_is_passed_on_must_be_there_and_its_value_stands_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "s3cret")
    script = sbatch_script(Job("merge"), ClusterConfig(pass_env=("WANDB_API_KEY",)), "merge", tmp_path / "out")
    assert "s3cret" not in script
    monkeypatch.delenv("WANDB_API_KEY")
    env = {**os.environ, **play_slurm(tmp_path / "bin", nodes=1)}
    done = subprocess.run(["bash", "-s"], input=script, text=True, env=env, cwd=tmp_path, capture_output=True, timeout=30, check=False)
    assert done.returncode == 2 and "WANDB_API_KEY is not set; export it where the job is submitted" in done.stderr
    assert not (tmp_path / "requeued").exists(), "queued again it would not have it either"


@pytest.mark.parametrize("word", ["runs/a\nb", "runs/a\rb"])
def test_a_line_break_in_a_path_is_refused(word: str) -> None:
    with pytest.raises(UserError, match="has a line break"):
        sbatch_script(Job("merge"), ClusterConfig(), "merge", Path(word))
    with pytest.raises(UserError, match="has a line break"):
        sbatch_script(Job("merge", overrides=(f"output={word}",)), ClusterConfig(), "merge", Path("runs/x"))
