"""Measures one case: builds the sides, warms them up, times them in turns, profiles ours. Called on every rank; figures are those of rank 0.

As many sides as the device holds are in memory together, and each round times every one of them: ours is timed once for all.

Owns: what is resident when, memory, what a failure does. A failure of one rank is told to all, so that the cases after it still run; where the ranks
no longer come together the run ends.
"""

import gc
import math
import platform
import re
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from megatron_prism.engine import garbage, parallel
from megatron_prism.engine.bench import figures, trace
from megatron_prism.engine.bench.baselines import BASELINES, choose, forget_fp8
from megatron_prism.engine.bench.cases import Case
from megatron_prism.engine.bench.clock import mark, matmul_tflops, milliseconds, synchronize
from megatron_prism.engine.bench.sides import Ours, Side
from megatron_prism.engine.parallel import Mesh
from megatron_prism.errors import UserError
from megatron_prism.planning import cost
from megatron_prism.surroundings import package_versions

PATIENCE_SECONDS = 180
"""that a rank waits for the others at the end of a part of the work"""
GIB = 2**30
MEMORY_SHARE = 0.92
"""of the device that two sides may take together by estimate"""
HUGGING_FACE_BYTES, AUTOCAST_BYTES, HUGGING_FACE_LOGIT_BYTES = 8, 18, 14
"""of a parameter (bf16 weight, gradient, two moments); the same in fp32, and autocast's bf16 copy; of a logit (bf16, fp32, and their gradients)"""
OUT_OF_MEMORY = "OutOfMemoryError"
Result = TypeVar("Result")


class CaseError(RuntimeError):
    """A part of a case failed, on this rank or on another; every rank raises it."""


class RanksApartError(RuntimeError):
    """A rank failed while others wait in an exchange with it: nothing more can be measured by this process group."""


@dataclass
class Timing:
    """The step times of one side, in milliseconds: [round][step], and the sums of its spans over all of them."""

    rounds: list[list[float]] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)

    def add(self, other: "Timing") -> None:
        """More rounds."""
        self.rounds += other.rounds
        for name, value in other.parts.items():
            self.parts[name] = self.parts.get(name, 0.0) + value


@dataclass(frozen=True)
class Open:
    """A side that is built and warm."""

    name: str
    side: Side
    memory: dict[str, float]
    seconds: float
    """that building it and its warm-up took"""
    timing: Timing


@dataclass(frozen=True)
class Site:
    """Where the sides of a case are measured: the case, its ranks, and the rate of one matrix product there and then."""

    case: Case
    mesh: Mesh
    ceiling: float
    """TFLOP/s"""
    product: str
    """what was multiplied"""


class Bench:
    """The process: its device, its place among the ranks, and the measurements."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.rank, self.ranks = device, dist.get_rank(), dist.get_world_size()
        self.control = dist.new_group(backend="gloo", timeout=timedelta(seconds=PATIENCE_SECONDS)) if self.ranks > 1 else None

    def machine(self) -> dict[str, Any]:
        """What the figures are of."""
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else platform.processor() or platform.machine()
        return {"device": name, "ranks": self.ranks, "python": platform.python_version(), **package_versions()}

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
            if not isinstance(error, UserError):
                traceback.print_exc()
        said = self._exchange(failure)
        first = next((text for text in said if text is not None), None)
        if first is not None:
            self.clean()
            raise CaseError(first)
        return cast(Result, found)

    def as_rank_0(self, answer: bool) -> bool:
        """Rank 0's, on every rank: clocks differ."""
        return self._exchange("yes" if answer else None)[0] is not None

    def _exchange(self, failure: str | None) -> list[str | None]:
        if self.control is None:
            return [failure]
        said: list[str | None] = [None] * self.ranks
        try:
            dist.all_gather_object(said, failure, group=self.control)
        except RuntimeError as error:
            apart = f"the ranks did not come together again within {PATIENCE_SECONDS} s"
            raise RanksApartError(apart if failure is None else f"{failure}; {apart}") from error
        return said

    def clean(self) -> None:
        """Give everything back that nobody holds."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _case(self, case: Case, traces: Path) -> dict[str, Any]:
        began = time.monotonic()
        chosen, skipped = choose(case, self.device)
        site = Site(case, parallel.build_mesh(case.plan, case.train.seed), *matmul_tflops(self.device))
        ours = self.open("ours", lambda: Ours(case, site.mesh, self.device), case.options.warmup)
        try:
            beside = self.beside(site, ours, chosen)
            later = [name for name in chosen if name not in beside or short_of_memory(case, beside[name])]
            alone = Timing()
            if later or not ours.timing.rounds:
                self.turns([(ours.side, alone)], case)
                ours.timing.add(alone)
            found = self.side_figures(site, ours)
            found["profile"] = self.attempt(lambda: self.profile(ours.side, case, traces))
        finally:
            ours.side.close()
            self.clean()
        for name in later:
            beside[name] = self.attempt(partial(self.after, site, alone, name))
        forget_fp8()
        beside |= {name: {"skipped": reason} for name, reason in skipped.items()}
        rates = {"matmul_tflops": site.ceiling, "matmul_tflops_after": matmul_tflops(self.device)[0], "matmul": site.product}
        return {**_describe(case, site.mesh), **rates, "ours": found, "baselines": beside, "seconds": time.monotonic() - began}

    def attempt(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A part whose failure leaves the rest of the case alone."""
        try:
            return self.together(work)
        except CaseError as error:
            return {"failed": str(error)}

    def beside(self, site: Site, ours: Open, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The figures of the baselines that share the memory with us; one that does not fit is not among them, one that fails says so.

        As many at once as fit. Where a group fails its members try again one by one.
        """
        found: dict[str, dict[str, Any]] = {}
        waiting, most = list(names), len(names)
        while waiting:
            group = list[Open]()
            try:
                said = self.attempt(partial(self.in_turns, site, ours, group)) if self.gather(site, ours, waiting, group, most, found) else {}
            finally:
                for other in group:
                    other.side.close()
                self.clean()
            if "failed" not in said:
                found |= said
            elif len(group) == 1:
                found[group[0].name] = said
            else:
                waiting, most = [*(other.name for other in group), *waiting], 1
        return found

    def gather(self, site: Site, ours: Open, waiting: list[str], group: list[Open], most: int, found: dict[str, Any]) -> bool:
        """Build up to so many of the baselines that wait, as many as fit beside ours and each other; whether there are any."""
        for name in list(waiting):
            held = sum(other.memory.get("between_steps_gib", 0.0) for other in group)
            if len(group) == most or (group and not self.fits(name, site.case, ours.memory, held)):
                continue
            waiting.remove(name)
            if not self.fits(name, site.case, ours.memory):
                continue
            try:
                group.append(self.together(partial(self.baseline, site, name)))
            except CaseError as error:
                found[name] = {"failed": str(error)}
        return bool(group)

    def baseline(self, site: Site, name: str) -> Open:
        """A baseline, built and warm."""
        return self.open(name, lambda: BASELINES[name](site.case, site.mesh, self.device), site.case.options.warmup)

    def in_turns(self, site: Site, ours: Open, group: list[Open]) -> dict[str, Any]:
        """Time ours and each of a group, all in memory, one turn each in every round; their figures by name."""
        mine = Timing()
        self.turns([(ours.side, mine), *((other.side, other.timing) for other in group)], site.case)
        found = {
            other.name: {
                **self.side_figures(site, other),
                "ratio": figures.ratio(mine.rounds, other.timing.rounds),
                "interleaved": True,
                "in_turns_with": ["ours", *(one.name for one in group if one is not other)],
            }
            for other in group
        }
        ours.timing.add(mine)
        return found

    def after(self, site: Site, alone: Timing, name: str) -> dict[str, Any]:
        """A baseline by itself, where both do not fit: its rounds are set against ours, taken before it."""
        other = self.baseline(site, name)
        try:
            self.turns([(other.side, other.timing)], site.case)
            found = self.side_figures(site, other)
        finally:
            other.side.close()
            self.clean()
        found["notes"] = [*found["notes"], "not in turns with ours but after it: the two do not fit into memory together, or resident=false"]
        return {**found, "ratio": figures.ratio(alone.rounds, other.timing.rounds), "interleaved": False}

    def fits(self, name: str, case: Case, memory: dict[str, float], held: float = 0.0) -> bool:
        """Whether a baseline fits beside ours and others, which hold so many GiB: by the case's wish, else by an estimate from what ours took."""
        if case.options.resident != "auto" or self.device.type == "cpu":
            return bool(case.options.resident)
        peak, steady = memory["peak_allocated_gib"], memory["between_steps_gib"]
        steady = peak if case.train.cuda_graphs else steady  # a graph keeps the room of its pass
        if name in ("bare_megatron_core", "without_cuda_graphs"):
            theirs = 1.1 * peak
        else:
            logits = case.plan.micro_batch * case.train.data.seq_len * case.model.vocab_size * HUGGING_FACE_LOGIT_BYTES / GIB
            weights = (AUTOCAST_BYTES if name.endswith("_autocast") else HUGGING_FACE_BYTES) * cost.num_parameters(case.model) / GIB
            theirs = weights + logits + 2 * (peak - steady)
        return steady + held + theirs < MEMORY_SHARE * torch.cuda.get_device_properties(self.device).total_memory / GIB

    def profile(self, side: Side, case: Case, traces: Path) -> dict[str, Any]:
        """What a trace of rank 0 tells; the other ranks take the same steps."""
        wanted = case.options.profile or (case.options.trace and self.device.type == "cuda")
        if not wanted:
            return {}
        if self.rank == 0:
            name = re.sub(r"[^A-Za-z0-9._-]+", "_", case.name)
            keep = traces / f"{name}.json.gz" if case.options.profile else None
            return trace.profile(side.step, self.device, keep)
        for _ in range(trace.STEPS[self.device.type]):
            side.step()
        synchronize(self.device)
        return {}

    def open(self, name: str, build: Callable[[], Side], warmup: int) -> Open:
        """Build a side and warm it up; with the most memory that it took, largest over the ranks. A side that fails on the way is closed.

        The last step of its warm-up is taken in turns with the others, where there are several.
        """
        self.clean()
        on_gpu, began = self.device.type == "cuda", time.monotonic()
        before = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) if on_gpu else (0, 0)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        side = build()
        try:
            for _ in range(max(warmup - 1, 1)):
                side.step()
            _check(side)
        except Exception:
            side.close()
            raise
        synchronize(self.device)
        side.timeline.read()  # the warm-up's
        return Open(name, side, self._memory(before) if on_gpu else {}, time.monotonic() - began, Timing())

    def _memory(self, before: tuple[int, int]) -> dict[str, float]:
        found = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), torch.cuda.memory_allocated())
        bytes_ = torch.tensor([found[0] - before[0], found[1] - before[1], found[2] - before[0]], dtype=torch.float64, device=self.device)
        dist.all_reduce(bytes_, dist.ReduceOp.MAX)
        return dict(zip(("peak_allocated_gib", "peak_reserved_gib", "between_steps_gib"), (bytes_ / GIB).tolist(), strict=True))

    def turns(self, sides: list[tuple[Side, Timing]], case: Case) -> None:
        """Time every side in every round, in this order and then in the other. The last step of a warm-up goes ahead, where it has more than one.

        No garbage is collected in the turns, of whichever side: the models that wait for theirs would make it slow.
        """
        options = case.options
        steps = math.ceil(options.steps / options.rounds)
        with garbage.by_hand(case.train.gc_interval):
            for number in range(-1 if options.warmup > 1 else 0, options.rounds):
                for side, timing in reversed(sides) if number % 2 else sides:
                    times = self.turn(side, steps if number >= 0 else 1)
                    parts = side.timeline.read()
                    if number >= 0:
                        timing.add(Timing([times], parts))
        for side, _ in sides:
            _check(side)

    def turn(self, side: Side, steps: int) -> list[float]:
        """Some steps on end, in milliseconds each."""
        synchronize(self.device)
        marks = [mark(self.device)]
        for _ in range(steps):
            side.step()
            marks.append(mark(self.device))
        synchronize(self.device)
        return [milliseconds(begin, end) for begin, end in pairwise(marks)]

    def side_figures(self, site: Site, opened: Open) -> dict[str, Any]:
        """What is reported of one side."""
        case, side, timing = site.case, opened.side, opened.timing
        times = [step for turn in timing.rounds for step in turn]
        summary = figures.summary(times)
        return {
            "step_ms": summary,
            **figures.rates(case.model, case.train.data.seq_len, case.tokens_per_step, self.ranks, summary["median"], site.ceiling),
            "split_ms": (parts := figures.split(timing.parts, times)),
            "data_share": parts["data"] / summary["mean"],
            "memory": opened.memory or None,
            "seconds_to_warm": opened.seconds,
            "parameters_on_rank_0": side.parameters(),
            "loss": side.loss(),
            "notes": side.notes,
        }


def short_of_memory(case: Case, found: dict[str, Any]) -> bool:
    """Whether a baseline failed beside ours for want of memory, and may run after it."""
    return case.options.resident == "auto" and OUT_OF_MEMORY in found.get("failed", "")


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
        "cuda_graphs": case.train.cuda_graphs,
        "tokens_per_step": case.tokens_per_step,
    }


def precision(case: Case) -> str:
    """fp32, bf16, or the FP8 recipe beside bf16."""
    fp8 = case.train.fp8
    return case.train.precision if fp8 is None else f"fp8 {fp8.recipe}" + (" params" if fp8.params else "")


def _check(side: Side) -> None:
    if not math.isfinite(side.loss()):
        raise UserError(f"the loss is {side.loss()}, and the time of such steps says nothing; lower train.optimizer.lr")


def _message(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
