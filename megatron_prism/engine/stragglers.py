"""A rank that is slower than those with the same work is named: by the time of its own work, as far as it can be told from waiting for others.

Measured are the forward passes of a rank's micro-batches (on CUDA by events, read when the step has waited for the device anyway) and its waits for
data. Backward passes and the rest run beside exchanges and are not, but with CUDA graphs, whose passes are timed whole and hold no exchange. Under tp
or cp a forward pass holds exchanges within the group, so all ranks of a group that has a slow one look slow. Compared are ranks of the same pipeline
stage: stages may be unequal by design.
One that is slow in two reports in a row is named: in one alone, it may have been another program's turn.
Owns: the clock, the exchange of one row a rank at each report, and who is named. Called on every rank.
"""

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median_low
from typing import Any

import torch
import torch.distributed as dist

from megatron_prism.engine.parallel import Mesh

FEWEST_STEPS = 5
"""of a report: fewer tell the machine's noise"""
LEAST_SHARE = 0.02
"""of a step's time: a rank that is behind by less costs nothing, however large the ratio"""


@dataclass
class Clock:
    """What this rank's own work took since the last report; the first step, in which kernels are compiled, is left out. device: where it computes."""

    device: torch.device | None = None
    measured: str = "forward"
    """what `forward` is put around, for people: whole passes, where a forward pass cannot be told from its backward pass (`cuda_graphs`)"""
    forward_seconds: float = 0.0
    steps: int = 0
    began: float = field(default_factory=time.perf_counter)
    data_seconds: float = 0.0
    waited_before: float = 0.0
    is_warm: bool = False
    slow_before: frozenset[int] = frozenset()
    hosts: list[str] = field(default_factory=list)
    _events: list[tuple[Any, Any]] = field(default_factory=list)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around one forward pass."""
        if self.device is not None and self.device.type == "cuda":
            events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
            events[0].record()
            yield
            events[1].record()
            self._events.append((events[0], events[1]))
            return
        begun = time.perf_counter()
        yield
        self.forward_seconds += time.perf_counter() - begun

    def end_step(self, waited_seconds: float) -> None:
        """A step is over, and the device has been waited for. waited_seconds: for data, in all."""
        self.forward_seconds += sum(begun.elapsed_time(ended) for begun, ended in self._events) / 1000
        self._events.clear()
        self.data_seconds += waited_seconds - self.waited_before
        self.waited_before = waited_seconds
        self.steps += 1
        if not self.is_warm:
            self.is_warm = True
            self.begin()

    def begin(self) -> None:
        """Count from here on."""
        self.forward_seconds, self.data_seconds, self.steps, self.began = 0.0, 0.0, 0, time.perf_counter()


@dataclass(frozen=True)
class Work:
    """A rank's own work, seconds of a step."""

    rank: int
    stage: int
    host: str
    forward: float
    data: float

    @property
    def seconds(self) -> float:
        """In all."""
        return self.forward + self.data


@dataclass(frozen=True)
class Slow:
    """A rank, and what its peers take."""

    work: Work
    peers_seconds: float
    peers_forward: float
    peers_data: float

    @property
    def ratio(self) -> float:
        """Its own work over its peers'."""
        return self.work.seconds / max(self.peers_seconds, 1e-9)

    def line(self, measured: str = "forward") -> str:
        """For people. measured: as a `Clock`'s."""
        work = self.work
        return (
            f"slow: rank {work.rank} ({work.host}, pipeline stage {work.stage}) needs {work.seconds:.3f} s for its own work of a step, "
            f"{self.ratio:.1f} times its peers' {self.peers_seconds:.3f} s: {measured} {work.forward - self.peers_forward:+.3f} s, "
            f"waiting for data {work.data - self.peers_data:+.3f} s"
        )


def report(clock: Clock, mesh: Mesh, percent: float | None) -> tuple[dict[str, Any], list[str]]:
    """What the log says of slow ranks: metrics and lines; nothing while there are too few steps. Called on every rank after the same step.

    percent: how much more than its peers a rank must need to be named; None: nobody looks.
    """
    if percent is None or clock.steps < FEWEST_STEPS or dist.get_world_size() == 1:
        return {}, []
    steps, seconds = clock.steps, time.perf_counter() - clock.began
    own = torch.tensor([clock.forward_seconds, clock.data_seconds, mesh.pp_rank], dtype=torch.float64, device=clock.device)
    rows = own.new_empty(dist.get_world_size(), len(own))
    dist.all_gather_into_tensor(rows.flatten(), own)
    if not clock.hosts:
        clock.hosts = [""] * len(rows)
        dist.all_gather_object(clock.hosts, socket.gethostname())
    clock.begin()
    works = [
        Work(rank, int(stage), clock.hosts[rank], forward / steps, data / steps) for rank, (forward, data, stage) in enumerate(rows.cpu().tolist())
    ]
    slow = slowest(works)
    found = [one for one in slow if one.ratio > 1 + percent / 100 and one.work.seconds - one.peers_seconds > LEAST_SHARE * seconds / steps]
    named = [one for one in found if one.work.rank in clock.slow_before]
    clock.slow_before = frozenset(one.work.rank for one in found)
    metrics = {"straggler/ratio": slow[0].ratio, "straggler/rank": slow[0].work.rank, "straggler/named": [one.work.rank for one in named]}
    return metrics, [one.line(clock.measured) for one in named]


def slowest(works: Sequence[Work]) -> list[Slow]:
    """Every rank beside its peers, the slowest first. The lower median stands for the peers, so that of two the faster one does."""
    found = []
    for work in works:
        peers = [other for other in works if other.stage == work.stage]
        found.append(Slow(work, *(median_low([getattr(other, what) for other in peers]) for what in ("seconds", "forward", "data"))))
    return sorted(found, key=lambda one: (-one.ratio, one.work.rank))
