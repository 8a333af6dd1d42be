"""Whether weights, master weights and moments are still, bit for bit, what the last update wrote: asked before the next update and before a save.

Nothing may write them in between, so where the sum of their bits, as integers, has changed, memory has: one flipped bit always changes it. Every
rank checks itself, so a weight that no other rank holds is seen too. Ranges that others update are compared with the sums of those who do: on CUDA
they are gathered in the next forward pass. What is computed wrongly is not seen, nor what changes within an update, or between a load and the first.
Owns: the sums, and the words for a rank whose memory changed. Called on every rank.
"""

import socket
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prism.engine.fp8_params import stored
from megatron_prism.engine.ranks import on_all
from megatron_prism.kernels.bit_sum import bit_sum

WHAT = ("the weights that it updates", "its master weights, moments or FP8 scales", "its copy of weights that other ranks update")


class MemoryCheck:
    """parts: the distributed optimizers of this rank; group: the ranks that hold the same weights; device: where."""

    def __init__(self, parts: list[Any], group: dist.ProcessGroup, device: torch.device) -> None:
        self.parts, self.group, self.device = parts, group, device
        self.known: Tensor | None = None
        """int64 [3], in the order of WHAT; None: not known, since something was loaded"""
        self.found: Tensor | None = None
        """of the last look: an update that is not made still gathers weights, and so mends copies"""

    def forget(self) -> None:
        """Somebody else writes weights or states now."""
        self.known = None

    @torch.no_grad()
    def remember(self) -> None:
        """What an update wrote. Called by all ranks of the group."""
        own, states = self._sum(self._own()), self._sum(self._states())
        everything = own.clone()
        dist.all_reduce(everything, group=self.group)
        self.known = torch.stack([own, states, everything])

    @torch.no_grad()
    def look(self) -> Tensor:
        """Which of WHAT is no longer what it was, bool [3], on the device; nothing where that is not known. Weights are gathered by now."""
        if self.known is None:
            self.found = torch.zeros(len(WHAT), dtype=torch.bool, device=self.device)
        else:
            self.found = torch.stack([self._sum(self._own()), self._sum(self._states()), self._sum(self._weights())]) != self.known
        return self.found

    def _sum(self, tensors: Iterable[Tensor]) -> Tensor:
        """Of all numbers, their bits taken as integers, int64 []: neither order nor place matters, so that sums of parts add up."""
        found = list(tensors)
        return bit_sum(found) if found else torch.zeros((), dtype=torch.int64, device=self.device)

    def _own(self) -> Iterable[Tensor]:
        return (weight for part in self.parts for weight in part.optimizer.owned())

    def _states(self) -> Iterable[Tensor]:
        return (tensor for part in self.parts for tensor in part.optimizer.states())

    def _weights(self) -> Iterable[Tensor]:
        return (stored(weight) for part in self.parts for buffer in getattr(part, "buffers", []) for weight in buffer.params)


def damages(check: MemoryCheck) -> list[str]:
    """Whose memory the last look found changed, for people; the same on every rank. A range that was gathered since is its owner's fault alone."""
    found = on_all(lambda rank: (rank, socket.gethostname(), check.found.tolist() if check.found is not None else []))
    owners = [one for one in found if any(one[2][:2])]
    return [f"rank {rank} ({host}): {WHAT[changed.index(True)]}" for rank, host, changed in owners or [one for one in found if any(one[2])]]
