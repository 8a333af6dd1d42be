"""The sbatch script: its whole text, that bash reads it, and that it starts the ranks when srun and scontrol are played by small scripts."""

import os
import stat
import subprocess
import sys
from pathlib import Path

from megatron_prism.launch.job import Job
from megatron_prism.launch.slurm import SlurmConfig, sbatch_script

GOLDEN = """\
#!/bin/bash
#SBATCH --job-name=midtrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=1-12:00:00
#SBATCH --account=lab
#SBATCH --output=runs/slurm/midtrain-%j.log

set -euo pipefail
module load cuda
export NCCL_DEBUG=WARN
export OMP_NUM_THREADS=8
export PYTHONSAFEPATH=1

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 12000))

srun --ntasks-per-node=1 --kill-on-bad-exit=1 --mpi=none \\
  python \\
    -m torch.distributed.run \\
    --nnodes "$SLURM_NNODES" \\
    --rdzv-backend c10d \\
    --rdzv-endpoint "$head:$port" \\
    --rdzv-id "$SLURM_JOB_ID" \\
    --max-restarts 0 \\
    --nproc-per-node 8 \\
    -m megatron_prism train 'recipes/my run.toml' train.steps=200
"""


def test_the_script_is_this_text_and_bash_reads_it(tmp_path: Path) -> None:
    job = Job("train", Path("recipes/my run.toml"), ("train.steps=200",), ranks=16, nodes=2, env={"NCCL_DEBUG": "WARN"})
    cluster = SlurmConfig(time="1-12:00:00", account="lab", gpus_per_node=8, cpus_per_node=64, srun=("--mpi=none",), setup="module load cuda")
    script = sbatch_script(job, cluster, "midtrain")
    assert script == GOLDEN
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_the_script_starts_every_rank_of_every_node(tmp_path: Path) -> None:
    """srun is played by a script that starts the command once for each of two nodes, as Slurm would, all on this machine."""
    (tmp_path / "tally").mkdir()
    (tmp_path / "tally/__init__.py").touch()
    (tmp_path / "tally/stage.py").write_text(
        "import os\nfrom pathlib import Path\nfrom megatron_prism.config import Block\n"
        "class Config(Block):\n    output: Path\n"
        "def parents(cfg): return []\ndef dry_run(cfg): pass\n"
        "def run(cfg):\n    e = os.environ\n"
        "    (cfg.output / e['RANK']).write_text(f\"{e['WORLD_SIZE']} {e['LOCAL_RANK']} {e['OMP_NUM_THREADS']}\")\n"
    )
    _program(tmp_path / "bin/scontrol", "echo localhost; echo localhost")
    _program(tmp_path / "bin/srun", 'while [[ "$1" == --* ]]; do shift; done; "$@" & first=$!; "$@"; wait $first')
    out = tmp_path / "out"
    out.mkdir()
    job = Job("tally.stage", overrides=(f'output="{out}"',), ranks=4, nodes=2)
    script = sbatch_script(job, SlurmConfig(python=sys.executable, cpus_per_node=2), "tally")
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "nodes[1-2]", "SLURM_JOB_ID": str(os.getpid())}
    env = {**os.environ, **slurm, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(["bash", "-s"], input=script, text=True, env=env, capture_output=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    found = {path.name: path.read_text() for path in out.iterdir()}
    assert found == {"0": "4 0 1", "1": "4 1 1", "2": "4 0 1", "3": "4 1 1"}


def _program(path: Path, body: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
