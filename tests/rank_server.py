"""Ranks by fork, from a process that has imported torch, megatron-core and the engine: a launch then takes no time for what every rank would import.

Started by tests/multirank.py. Reads one request a line (JSON: script, args, ranks, env, logs), answers {"status": 0 or 1}. Each rank is a
process of its own with a session of its own, finds in its environment what torchrun would put there, and meets the others in a store that a further
process holds. One rank that fails ends the others. Ends, with all of them, when nobody holds the other end of its standard input.
"""

import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

IMPORTED = ("megatron_prism.engine.loop", "megatron_prism.engine.policy", "megatron_prism.stages.train", "transformers.models.llama.modeling_llama")
PATIENCE_SECONDS = 20.0
"""between asking ranks to end and ending them"""


def main() -> None:
    """Serve until standard input ends."""
    launch = by_torchrun
    if not os.environ.get("RANKS_BY_TORCHRUN"):  # set where it is known: the imports are for nothing then
        for name in IMPORTED:
            importlib.import_module(name)
        # threads do not survive a fork: where an import has started some (numerical libraries of GPU images do), ranks are started by torchrun
        launch = serve if len(list(Path("/proc/self/task").iterdir())) == 1 else by_torchrun
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"status": launch(json.loads(line))}), flush=True)


def by_torchrun(request: dict[str, Any]) -> int:
    """The launch's status, where each rank imports everything for itself."""
    words = [
        "--standalone",
        f"--nproc-per-node={request['ranks']}",
        "--redirects=3",
        f"--log-dir={request['logs']}",
        request["script"],
        *request["args"],
    ]
    command = [sys.executable, "-m", "torch.distributed.run", *words]
    return int(subprocess.run(command, env=request["env"], stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False).returncode != 0)


def serve(request: dict[str, Any]) -> int:
    """Start the ranks, wait for them. 0, or 1 where one failed."""
    holder, port = hold_store()
    running = set()
    try:
        for rank in range(request["ranks"]):
            pid = os.fork()
            if not pid:
                run_rank(request, rank, port)
            running.add(pid)
        return wait(running)
    finally:
        if os.getpid() == SERVER:
            end(running)
            os.kill(holder, signal.SIGKILL)
            os.waitpid(holder, 0)


def hold_store() -> tuple[int, int]:
    """A process with the store in which ranks meet, and its port: its threads must not be in the process that forks."""
    import torch.distributed as dist

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        found.listen()
        port = int(found.getsockname()[1])
        ready, told = os.pipe()
        pid = os.fork()
        if not pid:
            os.setsid()
            store = dist.TCPStore(
                "127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60), master_listen_fd=os.dup(found.fileno())
            )
            os.write(told, b"1")
            while store is not None:
                signal.pause()
    os.close(told)
    os.read(ready, 1)
    os.close(ready)
    return pid, port


def run_rank(request: dict[str, Any], rank: int, port: int) -> NoReturn:
    """In the forked process: to the end of the program, by the script's error or by SystemExit."""
    os.setsid()
    ranks = str(request["ranks"])
    os.environ.clear()
    os.environ.update(request["env"], RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks)
    os.environ.update(GROUP_RANK="0", GROUP_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0", TORCHELASTIC_MAX_RESTARTS="0", TORCHELASTIC_RUN_ID="none")
    logs = Path(request["logs"]) / "none" / "attempt_0" / str(rank)
    logs.mkdir(parents=True)
    redirect(0, Path(os.devnull), os.O_RDONLY)
    redirect(1, logs / "stdout.log", os.O_WRONLY | os.O_CREAT)
    redirect(2, logs / "stderr.log", os.O_WRONLY | os.O_CREAT)
    sys.argv = [request["script"], *request["args"]]
    runpy.run_path(request["script"], run_name="__main__")
    sys.exit()


def redirect(descriptor: int, path: Path, flags: int) -> None:
    """Have a descriptor stand for a file."""
    opened = os.open(path, flags, 0o644)
    os.dup2(opened, descriptor)
    os.close(opened)


def wait(running: set[int]) -> int:
    """Until all have ended, or one has failed, or nobody waits for the answer."""
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            running.discard(pid)
            if status:
                return 1
        elif not pid:
            gone, _, _ = select.select([sys.stdin], [], [], 0.01)
            if gone and not os.read(0, 1):
                return 1
    return 0


def end(running: set[int]) -> None:
    """Ask what still runs to end; then end it."""
    for pid in running:
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while running:
        for pid in list(running):
            if os.waitpid(pid, os.WNOHANG)[0]:
                running.discard(pid)
            elif time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


SERVER = os.getpid()

if __name__ == "__main__":
    main()
