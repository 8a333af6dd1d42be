"""Several processes at one evaluation: which of them this is, and waiting for the others. All they share is the output folder.

Started by torchrun, or by anything that sets RANK, WORLD_SIZE (and LOCAL_RANK, for its GPU). Owns: the shares, a sign of life of each rank (a file
that is touched), waiting that ends when a rank no longer lives. Refuses: to wait for ever. A rank that died is started again and goes on.
"""

import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megatron_prism.errors import UserError
from megatron_prism.surroundings import NVIDIA_GPUS

BEAT_SECONDS = 2.0
POLL_SECONDS = 0.2
Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """This process among `world`. folder: of the signs of life, the output. patience_seconds: a rank without a sign for so long has died."""

    folder: Path
    rank: int = 0
    world: int = 1
    patience_seconds: float = 300.0

    @classmethod
    def of_environment(cls, output: Path, patience_seconds: float) -> "Ranks":
        """RANK and WORLD_SIZE; one process where they are not set. Errors: UserError where they are no rank of a world."""
        rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if not (rank.isdigit() and world.isdigit() and int(rank) < int(world)):
            raise UserError(f"RANK={rank} must lie in 0 to WORLD_SIZE - 1, with WORLD_SIZE={world}")
        return cls(output, int(rank), int(world), patience_seconds)

    @property
    def is_main(self) -> bool:
        """Whether this rank joins, scores and reports."""
        return self.rank == 0

    def take_own_gpus(self, count: int) -> None:
        """Leave this rank `count` of its machine's GPUs to see. Errors: UserError where there are too few for all its ranks."""
        local, ranks = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        listed = os.environ.get("CUDA_VISIBLE_DEVICES")
        seen = (
            [name for name in listed.split(",") if name]
            if listed is not None
            else [str(number) for number in range(len(list(NVIDIA_GPUS.glob("*"))))]
        )
        if ranks == 1 or not seen:
            return
        if len(seen) < ranks * count:
            raise UserError(f"{ranks} ranks with {count} GPUs each need {ranks * count}, this machine shows {len(seen)}: start fewer ranks on it")
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(seen[local * count : (local + 1) * count])

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Every world-th item: this rank's."""
        return list(items[self.rank :: self.world])

    @contextmanager
    def together(self) -> Iterator[None]:
        """`alive`, entered when rank 0 and every other rank have seen each other live.

        So nothing that ranks of an earlier launch left behind is taken for what those of this one say. Rank 0 goes on alone after patience_seconds:
        others may have done their share and ended.
        """
        first = {rank: self._last_beat(rank) for rank in (range(1, self.world) if self.is_main else [0])}
        with self.alive():
            if self.is_main:
                end = time.monotonic() + self.patience_seconds
                while time.monotonic() < end and any(self._last_beat(rank) == beat for rank, beat in first.items()):
                    time.sleep(POLL_SECONDS)
            else:
                self.wait("the start", lambda: [0] if self._last_beat(0) in (0, first[0]) else [])
                time.sleep(BEAT_SECONDS)  # long enough to be seen, however little there is to do
            yield

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Inside, this rank gives its sign of life."""
        ended = threading.Event()
        beat = threading.Thread(target=self._beat, args=(ended,), daemon=True)
        beat.start()
        try:
            yield
        finally:
            ended.set()
            beat.join()
            self._sign(self.rank).unlink(missing_ok=True)

    def wait(self, what: str, missing: Callable[[], Collection[int]]) -> None:
        """Until no rank is missing. Errors: UserError naming the ranks that gave no sign of life for patience_seconds."""
        seen: dict[int, tuple[int, float]] = {}
        while late := sorted(missing()):
            dead = [rank for rank in late if self._silent_seconds(rank, seen) > self.patience_seconds]
            if dead:
                raise UserError(
                    f"{what}: rank {', '.join(map(str, dead))} of {self.world} gave no sign of life for {self.patience_seconds:.0f} s; "
                    "start the same command again with all ranks: what is finished is kept"
                )
            time.sleep(POLL_SECONDS)

    def _beat(self, ended: threading.Event) -> None:
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sign(self.rank).touch()
            if ended.wait(BEAT_SECONDS):
                return

    def _silent_seconds(self, rank: int, seen: dict[int, tuple[int, float]]) -> float:
        """By our clock alone: hosts' clocks differ."""
        beat, now = self._last_beat(rank), time.monotonic()
        if rank not in seen or seen[rank][0] != beat:
            seen[rank] = (beat, now)
        return now - seen[rank][1]

    def _last_beat(self, rank: int) -> int:
        """When it last gave a sign, by its own clock; 0: it gave none."""
        try:
            return self._sign(rank).stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def _sign(self, rank: int) -> Path:
        return self.folder / f".rank_{rank}.tmp"  # an artifact does not count such files
