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

HEAD = """\
#!/bin/bash
#SBATCH --job-name=midtrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node={tasks}
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task={cpus}
#SBATCH --time=36:30:00
#SBATCH --signal=TERM@600
#SBATCH --account=lab
#SBATCH --partition=gpu
#SBATCH --output='runs/my run.log'
#SBATCH --open-mode=append
#SBATCH --export=ALL
#SBATCH --requeue
#SBATCH --constraint=h200

set -euo pipefail
module load cuda
source /shared/venv/bin/activate
: "${{WANDB_API_KEY:?is not set; export it where the job is submitted}}"
export GLOO_SOCKET_IFNAME=ib0
export NCCL_DEBUG=WARN
export NCCL_SOCKET_IFNAME=ib0
export OMP_NUM_THREADS=8
{torchrun}export PRISM_ERROR_FILE='runs/my run.error'
export PRISM_SAVE_SECONDS={seconds}
export PRISM_STOPPED_FILE='runs/my run.stopped'
export PRISM_TIMEOUT_MINUTES=20
export PYTHONSAFEPATH=1
{variables}read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p')
MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
export MASTER_ADDR MASTER_PORT

rm -f 'runs/my run.error' 'runs/my run.stopped'
status=0
"""
SRUN = """\
srun --ntasks-per-node=8 --kill-on-bad-exit=1 --cpus-per-task=8 --mpi=none \\
  bash \\
    -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_STEP_NUM_TASKS LOCAL_WORLD_SIZE=8; exec "$@"' rank python \\
    -m megatron_prism train 'recipes/my run.toml' steps=200 || status=$?
"""
OF_TORCHRUN = {
    "torchrun": "export PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT,SIGTERM,SIGUSR1,SIGUSR2\n",
    "variables": "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=570\n",
}
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
    -m megatron_prism train 'recipes/my run.toml' steps=200 || status=$?
"""
FT_LAUNCHER = TORCHRUN.replace("--max-restarts 0", "--max-restarts 3").replace(
    "    -m torch.distributed.run \\\n",
    "    -m nvidia_resiliency_ext.fault_tolerance.launcher \\\n"
    "    --ft-initial-rank-heartbeat-timeout 1000000000 \\\n    --ft-rank-heartbeat-timeout 1000000000 \\\n",
)
TAIL = """
[[ ! -e 'runs/my run.stopped' ]] || status=75  # it was told to stop, and has saved
[[ ! -e 'runs/my run.error' ]] || status=2  # bad input: its message is above
((status)) || [[ -e 'runs/my run'/COMPLETE ]] || status=75  # it ended well, before its work was done
# a job that Slurm itself has queued again, because a node was lost, is left alone
if ((status != 0 && status != 2)) && [[ $(scontrol --oneliner show job "$SLURM_JOB_ID") == *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]; then
  place=$(ls -1d 'runs/my run'/checkpoints/step_????????/COMPLETE 2>/dev/null | tail -n 1) || true
  echo "after ${place:-nothing}" >> 'runs/my run.failures'
  times=$(grep -cxF "after ${place:-nothing}" 'runs/my run.failures')
  echo "status $status, $times times now after ${place:-nothing}" >&2
  if ((times <= 3)); then scontrol requeue "$SLURM_JOB_ID" && sleep 60; fi  # until Slurm ends this script
fi
exit "$status"
"""
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
    assert script == HEAD.format(tasks=8, cpus=8, torchrun="", variables="", seconds=600) + SRUN + TAIL
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(("starter", "started"), [("torchrun", TORCHRUN), ("ft_launcher", FT_LAUNCHER)])
def test_the_script_in_which_torchrun_or_its_kin_starts_the_ranks_is_this_text_and_bash_reads_it(starter: str, started: str) -> None:
    script = sbatch_script(JOB, PLACE.model_copy(update={"starter": starter}), "midtrain", Path("runs/my run"))
    assert script == HEAD.format(tasks=1, cpus=64, seconds=570, **OF_TORCHRUN) + started + TAIL
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_a_stage_of_one_process_starts_it_alone_in_a_container() -> None:
    place = ClusterConfig(container="/img/my prism.sqsh", mounts=("/data:/data", "/models:/models:ro"))
    script = sbatch_script(Job("merge", Path("merge.toml")), place, "merge", Path("runs/merged"))
    container = f"'--container-image=/img/my prism.sqsh' --container-workdir={Path.cwd()} --container-mounts=/data:/data,/models:/models:ro"
    start = f"srun --ntasks-per-node=1 --kill-on-bad-exit=1 {container} \\\n  python \\\n    -m megatron_prism merge merge.toml || status=$?"
    assert start in script
    assert "MASTER_ADDR" not in script and "--time" not in script and "--signal" not in script
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
    assert not (project / "requeued").exists() and {path.name for path in (project / "runs").iterdir()} == {ODD}


def test_a_job_that_was_stopped_or_failed_is_queued_again_and_given_up_where_it_makes_no_progress(project: Path) -> None:
    stopped = _run(project, ending="early", ranks=2)
    assert stopped.returncode == 75 and "status 75, 1 times now after nothing" in stopped.stderr
    assert (project / "requeued").read_text() == "4711\n"
    failed = _run(project, ending="raise", ranks=2)
    assert failed.returncode == 1 and "the numbers ran out" in failed.stderr and "2 times now after nothing" in failed.stderr
    assert (project / "requeued").read_text() == "4711\n", "requeues = 1: not a second time from the same place"
    mark = project / "runs" / ODD / "checkpoints/step_00000004/COMPLETE"
    damaged = mark.parent.with_name("step_00000006.damaged-1") / "COMPLETE"
    for path in (mark, damaged):
        path.parent.mkdir(parents=True)
        path.touch()
    assert f"1 times now after {mark}" in _run(project, ending="raise", ranks=2).stderr, "what was set aside is no place to go on from"
    assert (project / "requeued").read_text() == "4711\n4711\n", "a new checkpoint is progress"
    (project / "restarts").write_text("1")
    assert "times now" not in _run(project, ending="raise", ranks=2).stderr
    assert (project / "requeued").read_text() == "4711\n4711\n", "Slurm has queued it again itself"


@pytest.mark.parametrize("starter", ["srun", "torchrun"])
def test_told_to_stop_is_status_75_whatever_those_answer_who_started_the_ranks(project: Path, starter: str) -> None:
    stopped = _run(project, starter, ending="stop", ranks=2)
    assert stopped.returncode == 75 and "status 75, 1 times now after nothing" in stopped.stderr
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
    done = subprocess.run(["bash", "-s"], input=script, text=True, capture_output=True, timeout=30, check=False)
    assert done.returncode != 0 and "WANDB_API_KEY: is not set; export it where the job is submitted" in done.stderr


@pytest.mark.parametrize("word", ["runs/a\nb", "runs/a\rb"])
def test_a_line_break_in_a_path_is_refused(word: str) -> None:
    with pytest.raises(UserError, match="has a line break"):
        sbatch_script(Job("merge"), ClusterConfig(), "merge", Path(word))
    with pytest.raises(UserError, match="has a line break"):
        sbatch_script(Job("merge", overrides=(f"output={word}",)), ClusterConfig(), "merge", Path("runs/x"))
