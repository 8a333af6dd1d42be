"""Slurm's commands played by small scripts on this machine, for tests of what our scripts do with them."""

import os
from pathlib import Path

SRUN = r"""
for word in "$@"; do case "$word" in --ntasks-per-node=*) tasks=${word#*=};; esac; done
while [[ "$1" == --* ]]; do shift; done
export SLURM_STEP_NUM_TASKS=$((tasks * SLURM_NNODES))
pids=()
for ((task = 0; task < SLURM_STEP_NUM_TASKS; task++)); do
  SLURM_PROCID=$task SLURM_LOCALID=$((task % tasks)) "$@" & pids+=($!)
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit "$status"
"""

SCONTROL = r"""
case "$*" in
  "show hostnames "*) for ((node = 0; node < SLURM_NNODES; node++)); do echo "node$node"; done;;
  "--oneliner show node node0") echo "NodeName=node0 Arch=x86_64 NodeAddr=127.0.0.1 NodeHostName=node0 Port=6818";;
  "--oneliner show job "*)
    echo "JobId=$4 $(cat state 2>/dev/null || echo "JobState=RUNNING Reason=None") Restarts=$(cat restarts 2>/dev/null || echo 0) BatchFlag=1";;
  "requeue "*) echo "$2" >> requeued;;
  "update "*) echo "$3" >> updated;;
  *) echo "unexpected: scontrol $*" >&2; exit 1;;
esac
"""


def play_slurm(folder: Path, nodes: int, **programs: str) -> dict[str, str]:
    """Write the programs into a folder; the variables that put a script into a job of `nodes` nodes there. programs: more of them, as bash."""
    folder.mkdir(exist_ok=True)
    for name, body in {"srun": SRUN, "scontrol": SCONTROL, "squeue": "", "sleep": "", **programs}.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}")
        (folder / name).chmod(0o755)
    # a number of our own makes a port of our own
    return {"SLURM_NNODES": str(nodes), "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_ID": "4711", "PATH": f"{folder}:{os.environ['PATH']}"}
