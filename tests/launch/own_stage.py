"""A stage of one's own, as the documentation tells to write it: it counts down, and can fail in every way that a stage can."""

import os
import signal
import time
from pathlib import Path

from megatron_prism import artifact
from megatron_prism.config import Block, ParallelConfig
from megatron_prism.errors import UserError


class Config(Block):
    """What to count, and how to end."""

    output: Path
    """folder to write"""
    count: int = 3
    """how far to count"""
    label: str | None = "item"
    """written beside each number"""
    source: Path | None = None
    """a finished folder of this stage to count on from"""
    ending: str = "well"
    """well, raise, refuse, kill, exit, early, deaf"""
    parallel: ParallelConfig = ParallelConfig()
    """layout"""


def parents(cfg: Config) -> list[Path]:
    """What it counts on from."""
    return [cfg.source] if cfg.source else []


def dry_run(cfg: Config) -> None:
    """Say it."""
    print(f"would count to {cfg.count}")


def run(cfg: Config) -> Path:
    """Count, one number a line, rank 0 writing the folder."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        artifact.begin(cfg.output, "count", cfg, parents(cfg))
    for number in range(1, cfg.count + 1):
        print(f"rank {rank} pid {os.getpid()} counts {number}", flush=True)
    _end(cfg.ending, rank)
    if rank == 0 and cfg.ending != "early":
        (cfg.output / "count.txt").write_text(str(cfg.count))
        artifact.complete(cfg.output)
    return cfg.output


def _end(ending: str, rank: int) -> None:
    if ending == "raise":
        raise RuntimeError("the numbers ran out")
    if ending == "refuse":
        raise UserError("count=3 must be prime and even; try count=2")
    if ending == "refuse on rank 1" and rank == 1:
        raise UserError("rank 1 alone cannot count")
    if ending == "exit":
        raise SystemExit(7)
    if ending == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    if ending == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
