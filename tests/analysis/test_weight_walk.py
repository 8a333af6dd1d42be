"""A walk over the weights of several models: the same figures for any number of torch's threads, and no worker that outlives it."""

import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import write_tiny

from megatron_prism.analysis import measure, stream


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, ...]:
    """Two models, whose MLPs' matrices are large enough for torch to share them between threads."""
    root = tmp_path_factory.mktemp("models")
    return tuple(write_tiny("llama", root / str(seed), seed=seed, intermediate_size=1024) for seed in (0, 1))


def test_figures_are_the_same_for_any_number_of_threads(folders):
    job = stream.Job(("a", "b"), folders, ((0, 1),), (), frozenset({0}), "stable")
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(stream.walk(job, 1, lambda rule, batch: None))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]
    assert max(one.matrix.shape[0] * one.matrix.shape[-1] for batch in found[0] for one in batch.measured) >= 1 << 16


def test_figures_are_the_same_for_any_number_of_threads_that_share_a_matrix(folders, monkeypatch):
    """Parts so small that every thread takes many of every matrix."""
    monkeypatch.setattr(measure, "RUN", 1 << 10)
    job = stream.Job(("a", "b", "c"), (*folders, folders[0]), ((0, 1), (0, 2)), ((0, 1),), frozenset(), None)
    one, two, five = (stream.walk(job, 1, lambda rule, batch: None, threads=threads) for threads in (1, 2, 5))
    assert one == two == five


class Watched:
    """A model that notes whose tensors are in memory when others are read."""

    def __init__(self, parent: Any, number: int, alive: list[tuple[int, Any]], most: list[int]) -> None:
        self.parent, self.number, self.alive, self.most = parent, number, alive, most

    def tensors(self, entry: Any) -> list[torch.Tensor]:
        found: list[torch.Tensor] = self.parent.tensors(entry)
        self.alive += [(self.number, weakref.ref(tensor)) for tensor in found]
        self.most.append(len({number for number, tensor in self.alive if tensor() is not None}))
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.parent, name)


@pytest.mark.parametrize(("angles", "held"), [((), 2), (((0, 2),), 3)])
def test_two_models_tensors_are_in_memory_at_a_time_and_three_where_angles_are_taken(folders, angles, held):
    pairs = ((0, 1), (1, 2), (0, 3), (2, 3))
    walker = stream.Walker(stream.Job(("a", "b", "c", "d"), (*folders, *folders), pairs, angles, frozenset(), None))
    alive: list[tuple[int, Any]] = []
    most: list[int] = []
    walker.parents = [Watched(parent, number, alive, most) for number, parent in enumerate(walker.parents)]  # type: ignore[misc]
    for place in range(len(walker.entries)):
        walker.batch(place)
    assert max(most) == held and len(most) >= 4 * len(walker.entries)


PARENT = """
import multiprocessing, sys, time
from pathlib import Path
from megatron_prism.analysis import stream

def stop(rule, batch):
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    stream.walk(stream.Job(("a", "b"), tuple(map(Path, sys.argv[1:])), ((0, 1),), (), frozenset(), None), 2, stop)
"""


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed(folders, tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    with subprocess.Popen([sys.executable, tmp_path / "parent.py", *folders], stdout=subprocess.PIPE, text=True) as parent:
        workers = [int(worker) for worker in parent.stdout.readline().split()]
        parent.kill()
    deadline = time.monotonic() + 10
    while (left := [worker for worker in workers if Path(f"/proc/{worker}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert len(workers) == 2 and not left
