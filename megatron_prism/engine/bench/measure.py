"""Measures one case: builds the sides, warms them up, times them in turns, profiles ours. Called on every rank; figures are those of rank 0.

Owns: what is resident when, memory, what a failure does. A failure of one rank is told to all, so that the cases after it still run; where the ranks
no longer come together the run ends.
"""

import gc
import math
import platform
from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_prism import artifact
from megatron_prism.engine import parallel
from megatron_prism.engine.bench import figures
from megatron_prism.engine.bench.cases import Case
from megatron_prism.engine.bench.clock import mark, matmul_tflops, milliseconds, synchronize
from megatron_prism.engine.bench.sides import Ours, Side
from megatron_prism.engine.parallel import Mesh
from megatron_prism.errors import UserError
from megatron_prism.planning import cost

PATIENCE_SECONDS = 180
"""that a rank waits for the others at the end of a part of the work"""
GIB = 2**30
Result = TypeVar("Result")


class CaseError(RuntimeError):
    """A part of a case failed, on this rank or on another; every rank raises it."""


class RanksApartError(RuntimeError):
    """A rank failed while others wait in an exchange with it: nothing more can be measured by this process group."""


class Bench:
    """The process: its device, its place among the ranks, and the measurements."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.rank, self.ranks = device, dist.get_rank(), dist.get_world_size()
        self.control = dist.new_group(backend="gloo", timeout=timedelta(seconds=PATIENCE_SECONDS)) if self.ranks > 1 else None

    def machine(self) -> dict[str, Any]:
        """What the figures are of."""
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else platform.processor() or platform.machine()
        return {"device": name, "ranks": self.ranks, "python": platform.python_version(), **artifact.package_versions()}

    def case(self, case: Case, traces: Path) -> dict[str, Any]:
        """The figures of a case. Errors: CaseError, RanksApartError."""
        return self.together(lambda: self._case(case, traces))

    def together(self, work: Callable[[], Result]) -> Result:
        """Do it on every rank, and come together. Errors: CaseError on all ranks with what the first rank said that failed."""
        found, failure = None, None
        try:
            found = work()
        except RanksApartError:
            raise
        except Exception as error:  # a boundary: the failure of a case is a result
            failure = _message(error)
        said = self._exchange(failure)
        first = next((text for text in said if text is not None), None)
        if first is not None:
            self.clean()
            raise CaseError(first)
        return found  # type: ignore[return-value]

    def _exchange(self, failure: str | None) -> list[str | None]:
        if self.control is None:
            return [failure]
        said: list[str | None] = [None] * self.ranks
        try:
            dist.all_gather_object(said, failure, group=self.control)
        except RuntimeError as error:
            raise RanksApartError(failure or f"other ranks did not come back within {PATIENCE_SECONDS} s") from error
        return said

    def clean(self) -> None:
        """Give everything back that nobody holds."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _case(self, case: Case, traces: Path) -> dict[str, Any]:
        mesh = parallel.build_mesh(case.plan, case.train.seed)
        ceiling, product = matmul_tflops(self.device)
        side, memory = self.open(lambda: Ours(case, mesh, self.device), case.options.warmup)
        try:
            rounds = self.turns([side], case)
            result = self.side_figures(case, side, rounds[0], memory, ceiling)
        finally:
            side.close()
            del side
            self.clean()
        return {**_describe(case, mesh), "matmul_tflops": ceiling, "matmul": product, "ours": result}

    def open(self, build: Callable[[], Side], warmup: int) -> tuple[Side, dict[str, float]]:
        """Build a side and warm it up; and the most memory that it took, largest over the ranks. A side that fails on the way is closed."""
        self.clean()
        on_gpu = self.device.type == "cuda"
        before = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) if on_gpu else (0, 0)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        side = build()
        try:
            for _ in range(warmup):
                side.step()
            if not math.isfinite(side.loss()):
                raise UserError(f"the loss is {side.loss()} after {warmup} steps, and a figure of such steps says nothing; lower train.optimizer.lr")
        except Exception:
            side.close()
            raise
        synchronize(self.device)
        side.timeline.read()  # the warm-up's
        return side, self._memory(before) if on_gpu else {}

    def _memory(self, before: tuple[int, int]) -> dict[str, float]:
        found = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), torch.cuda.memory_allocated())
        bytes_ = torch.tensor([found[0] - before[0], found[1] - before[1], found[2] - before[0]], dtype=torch.float64, device=self.device)
        dist.all_reduce(bytes_, dist.ReduceOp.MAX)
        return dict(zip(("peak_allocated_gib", "peak_reserved_gib", "between_steps_gib"), (bytes_ / GIB).tolist(), strict=True))

    def turns(self, sides: list[Side], case: Case) -> list[list[list[float]]]:
        """Milliseconds of steps, [side][round][step]; in each round every side takes its turn, first one first, then the other."""
        options = case.options
        steps = math.ceil(options.steps / options.rounds)
        found: list[list[list[float]]] = [[] for _ in sides]
        for number in range(-1 if len(sides) > 1 else 0, options.rounds):
            order = list(enumerate(sides))
            for place, side in reversed(order) if number % 2 else order:
                times = self.turn(side, steps if number >= 0 else 1)
                if number >= 0:  # the round before is for caches and clocks to settle
                    found[place].append(times)
                else:
                    side.timeline.read()
        return found

    def turn(self, side: Side, steps: int) -> list[float]:
        """Some steps on end, in milliseconds each."""
        synchronize(self.device)
        marks = [mark(self.device)]
        for _ in range(steps):
            side.step()
            marks.append(mark(self.device))
        synchronize(self.device)
        return [milliseconds(begin, end) for begin, end in pairwise(marks)]

    def side_figures(self, case: Case, side: Side, rounds: list[list[float]], memory: dict[str, float], ceiling: float) -> dict[str, Any]:
        """What is reported of one side."""
        times = [step for turn in rounds for step in turn]
        summary = figures.summary(times)
        return {
            "step_ms": summary,
            **figures.rates(case.model, case.train.data.seq_len, case.tokens_per_step, self.ranks, summary["median"], ceiling),
            "split_ms": figures.split(side.timeline.read(), times),
            "memory": memory or None,
            "parameters_on_rank_0": side.parameters(),
            "loss": side.loss(),
            "notes": side.notes,
        }


def _describe(case: Case, mesh: Mesh) -> dict[str, Any]:
    plan = mesh.plan
    return {
        "name": case.name,
        "model": case.options.model,
        "parameters": cost.num_parameters(case.model),
        "layers": case.model.num_layers,
        "vocab_size": case.model.vocab_size,
        "seq_len": case.train.data.seq_len,
        "global_batch": case.train.global_batch,
        "micro_batch": plan.micro_batch,
        "micro_batches": plan.num_microbatches,
        "ranks": plan.world_size,
        "layout": plan.describe(),
        "precision": precision(case),
        "recompute": case.train.recompute,
        "tokens_per_step": case.tokens_per_step,
    }


def precision(case: Case) -> str:
    """fp32, bf16, or the FP8 recipe beside bf16."""
    fp8 = case.train.fp8
    return case.train.precision if fp8 is None else f"fp8 {fp8.recipe}" + (" params" if fp8.params else "")


def _message(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
