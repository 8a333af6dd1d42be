"""A pass over the weights of several models: every matrix measured once for every pair, two tensors (three where updates are compared) at a time.

Owns: who reads what, in one process or several, each with its own rules and its part of the cores; figures are the same for any number of them and
any form of the models.
Refuses: NaN and infinite weights, by model and tensor, where they are met.
Peak memory of a process: the tensors of one rule of two (or three) models, the fp32 update of one matrix where ranks are asked for (its float64
copies besides where its smaller side is at most `rank.SMALL`, or for the effective rank), and, of Hugging Face folders, the pages of one mapped shard
each, which the kernel takes back when it needs them.
"""

import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron_prism.analysis import measure
from megatron_prism.analysis.matrices import Matrix, matrices
from megatron_prism.analysis.rank import effective_rank, scaled_change, stable_rank
from megatron_prism.analysis.sums import Cosine, Sums
from megatron_prism.data_prep import processes
from megatron_prism.engine import merging
from megatron_prism.errors import UserError
from megatron_prism.families.family import Layered

Rank = Literal["stable", "effective"] | None
MOST_THREADS = 8
"""of a process; with more they wait for each other's turn in the interpreter"""


@dataclass(frozen=True)
class Job:
    """What to measure. Models are spoken of by their place in `folders`."""

    names: tuple[str, ...]
    folders: tuple[Path, ...]
    pairs: tuple[tuple[int, int], ...]
    cosines: tuple[tuple[int, int], ...]
    """places in `pairs`: two updates from one start"""
    ranked: frozenset[int]
    """places in `pairs` whose updates' rank is taken"""
    rank: Rank


@dataclass(frozen=True)
class Update:
    """What one pair did to one matrix."""

    slices: tuple[Sums, ...]
    stable_rank: float | None = None
    effective_rank: float | None = None


@dataclass(frozen=True)
class Measured:
    """One matrix: an update for each pair, a cosine (of each slice) for each two."""

    matrix: Matrix
    updates: tuple[Update, ...]
    cosines: tuple[tuple[Cosine, ...], ...]


class Batch(NamedTuple):
    """One rule's matrices."""

    measured: list[Measured]
    nbytes: int
    """read, of all models"""
    elements: dict[int, Counter[str]]
    """model -> type that its tensors came in -> elements"""


@dataclass
class Walker:
    """The models, open."""

    job: Job
    spread: measure.Spread = map
    parents: list[merging.Parent] = field(init=False)

    def __post_init__(self) -> None:
        """Errors: UserError naming a tensor that is missing, misshapen or unread."""
        self.parents = [merging.open_parent(folder) for folder in self.job.folders]
        first = self.parents[0]
        self.entries = list(first.family.rules(first.model))

    def batch(self, place: int) -> Batch:
        """Measure the matrices of one rule."""
        entry = self.entries[place]
        read = _Read(self.parents, entry, keep=3 if self.job.cosines else 2)
        found = list(matrices(entry, self.parents[0].model))
        updates = [[self._update(read, matrix, number) for matrix in found] for number in range(len(self.job.pairs))]
        cosines = [[self._cosine(read, matrix, pair) for matrix in found] for pair in self.job.cosines]
        measured = [
            Measured(matrix, tuple(one[index] for one in updates), tuple(one[index] for one in cosines)) for index, matrix in enumerate(found)
        ]
        return Batch(measured, read.nbytes, read.elements)

    def _update(self, read: "_Read", matrix: Matrix, number: int) -> Update:
        pair = self.job.pairs[number]
        old, new = (read(model, matrix) for model in pair)
        try:
            slices = tuple(measure.sums(old[rows], new[rows], self.spread) for rows in _rows(matrix))
        except measure.NotFiniteError as error:
            model = pair[error.which]
            raise UserError(
                f"model {self.job.names[model]} ({self.job.folders[model]}): {matrix.name} holds {error.count} values that are NaN or infinite; "
                "weights must be finite to be compared: take an earlier checkpoint"
            ) from None
        change = scaled_change(old, new) if number in self.job.ranked and self.job.rank is not None else None
        if change is None:
            return Update(slices)
        return Update(slices, stable_rank(change), effective_rank(change) if self.job.rank == "effective" else None)

    def _cosine(self, read: "_Read", matrix: Matrix, pair: tuple[int, int]) -> tuple[Cosine, ...]:
        (start, one), (_, other) = (self.job.pairs[place] for place in pair)
        first, second, third = (read(model, matrix) for model in (start, one, other))
        return tuple(measure.cosine(first[rows], second[rows], third[rows], self.spread) for rows in _rows(matrix))


def _rows(matrix: Matrix) -> Iterator[slice]:
    first = matrix.slices[0].start
    return (slice(part.start - first, part.stop - first) for part in matrix.slices)


class _Read:
    """The tensors of one rule, read from a model when they are asked for; the last `keep` models' stay."""

    def __init__(self, parents: Sequence[merging.Parent], entry: Layered, keep: int) -> None:
        self.parents, self.entry, self.keep = parents, entry, keep
        self.held: OrderedDict[int, list[Tensor]] = OrderedDict()
        self.nbytes, self.elements = 0, {place: Counter[str]() for place in range(len(parents))}

    def __call__(self, model: int, matrix: Matrix) -> Tensor:
        """Its rows of the tensor."""
        if model not in self.held:
            while len(self.held) >= self.keep:
                self.held.popitem(last=False)
            tensors = self.parents[model].tensors(self.entry)
            self.held[model] = tensors
            self.nbytes += sum(tensor.nbytes for tensor in tensors)
            self.elements[model] = _elements(tensors)
        self.held.move_to_end(model)
        return self.held[model][matrix.tensor][slice(*matrix.rows)]


def _elements(tensors: Sequence[Tensor]) -> Counter[str]:
    found = Counter[str]()
    for tensor in tensors:
        found[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return found


def walk(
    job: Job, workers: int, measured: Callable[[int, Batch], None], found: Mapping[int, Batch] | None = None, threads: int | None = None
) -> list[Batch]:
    """Every rule's matrices, in the order of the family's rules.

    measured: told of every rule that is done, with its place; found: those that were done before, by place, which are not measured again;
    threads: of each process; None: all cores between the workers. Errors: UserError.
    """
    batches = dict(found or {})
    threads = threads or max(1, min(MOST_THREADS, len(os.sched_getaffinity(0)) // workers))

    def take(place: int, batch: Batch) -> None:
        batches[place] = batch
        measured(place, batch)

    if workers == 1:
        with _one_thread(), _threads(threads) as spread:
            here = Walker(job, spread)
            for place in range(len(here.entries)):
                if place not in batches:
                    take(place, here.batch(place))
        return _in_order(batches)
    places = [place for place in range(len(Walker(job).entries)) if place not in batches]
    try:
        with processes.pool(workers, _open, (job, threads)) as pool:
            for place, batch in zip(places, pool.map(_batch, places), strict=True):
                take(place, batch)
    except BrokenProcessPool:
        raise UserError(f"one of workers={workers} processes ended, killed for want of memory perhaps; try workers={workers // 2}") from None
    return _in_order(batches)


@contextmanager
def _threads(count: int) -> Iterator[measure.Spread]:
    """What spreads the runs of a matrix over so many threads."""
    if count == 1:
        yield map
        return
    with ThreadPoolExecutor(count) as pool:
        yield pool.map


@contextmanager
def _one_thread() -> Iterator[None]:
    """As in a worker: how torch orders a sum depends on its threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _in_order(batches: Mapping[int, Batch]) -> list[Batch]:
    return [batches[place] for place in sorted(batches)]


_walker: Walker
_held = ExitStack()
"""a worker's threads"""


def _open(state: tuple[Job, int]) -> None:
    global _walker
    job, threads = state
    processes.begin()
    torch.set_num_threads(1)
    _walker = Walker(job, _held.enter_context(_threads(threads)))


def _batch(place: int) -> Batch:
    return _walker.batch(place)
