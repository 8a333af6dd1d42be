"""CUDA graphs seen from their host, on a CPU: when they are captured and given back, what a clock sees of them, and which errors are the model's.

A pass cannot be captured here: `Retaken` takes it eagerly where a graph would replay it. The captures themselves: tests/gpu/test_gpu_cuda_graphs.py.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training import from_random, recipe

from megatron_prism.config import load_recipe
from megatron_prism.data_prep.history import recorded
from megatron_prism.engine import calendar, cuda_graphs, loop, recovery
from megatron_prism.engine.cuda_graphs import WARM_STEPS, MicroBatchGraphs, one_pass
from megatron_prism.engine.loop import Run
from megatron_prism.engine.recipe import TrainConfig
from megatron_prism.errors import UserError

pytestmark = pytest.mark.usefixtures("leave_groups")
CAPTURE_SECONDS = 1.0
CPU = torch.device("cpu")


class Retaken(MicroBatchGraphs):
    """captured: the steps that were over at each capture."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.captured: list[int] = []

    @property
    def _is_eager(self) -> bool:
        return self.steps < WARM_STEPS

    def _capture(self, model: Any, inputs: Any, sums: Any, is_first: bool) -> Any:
        self.captured.append(self.steps)
        time.sleep(CAPTURE_SECONDS)
        self.kept.append(inputs)
        return SimpleNamespace(replay=lambda: one_pass(model, inputs, sums, is_first))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture
def run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Three steps of one whose third captured."""
    build = loop.build_engine
    monkeypatch.setattr(loop, "build_engine", lambda *args: replace(build(*args), graphs=Retaken()))
    words = recipe(root, tmp_path / "run", **from_random(root), bad_steps__on_nan="skip", global_batch=2, steps=9)
    run = loop.build_run(load_recipe(None, words, TrainConfig))
    for _ in range(3):
        loop._step(run)
    assert captures(run) == [2] and holds(run)
    yield run
    run.close()


def captures(run: Run) -> list[int]:
    graphs = run.engine.graphs
    assert isinstance(graphs, Retaken)
    return graphs.captured


def holds(run: Run) -> bool:
    """Whether memory of a capture is held."""
    graphs = run.engine.graphs
    assert graphs is not None
    return bool(graphs.graphs or graphs.kept or graphs.inputs)


def test_a_replay_of_a_bad_step_finds_the_memory_of_the_graphs_free(run, monkeypatch):
    held: list[bool] = []
    find = recovery.origin.find
    monkeypatch.setattr(recovery.origin, "find", lambda *args: (held.append(holds(run)), find(*args))[1])
    weight = next(run.engine.model[0].parameters())
    before = weight.detach().clone()
    weight.data.view(-1)[5] = torch.nan
    assert not loop._step(run).applied and run.progress.step == 4
    assert held == [False]
    weight.data.copy_(before)
    assert loop._step(run).applied
    assert captures(run) == [2, 4], "the next step captured anew"


def test_an_evaluation_of_the_run_finds_the_memory_of_the_graphs_free(run):
    held: list[bool] = []
    run.evaluate = lambda folder: held.append(holds(run)) or {}
    calendar._evaluate(run)
    assert held == [False]


def test_a_run_that_goes_back_finds_the_memory_of_the_graphs_free(run, monkeypatch):
    held: list[bool] = []
    load = recovery.checkpoint.load_all
    monkeypatch.setattr(recovery.checkpoint, "load_all", lambda *args: (held.append(holds(run)), load(*args))[1])
    loop._save(run)
    place = recovery.Return("step_00000003", 3, run.progress.samples, run.progress.samples, 2)
    recovery._go_back(run, place, recorded(run.data.fingerprint))
    assert held == [False] and run.progress.step == 3


def test_the_clock_of_stragglers_sees_passes_and_no_capture_and_says_so(run):
    clock = run.engine.clock
    assert clock.steps == 2 and 0 < clock.forward_seconds < CAPTURE_SECONDS
    assert clock.measured == "forward and backward"


# --- captures that fail --------------------------------------------------------------------------------------------------------------------------

ECC, CAPTURING = "CUDA error: uncorrectable ECC error encountered", "CUDA error: operation not permitted when stream is capturing"
INVALIDATED = "CUDA error: operation failed due to a previous error during capture"


def failing(monkeypatch: pytest.MonkeyPatch, inside: Exception | None, at_end: str | None = None, before: str | None = None) -> None:
    """torch.cuda whose captures fail so: in the pass, as the capture ends, or as the device is waited for before it."""

    @contextmanager
    def recording(*args: Any, **kwargs: Any) -> Iterator[None]:
        try:
            yield
        finally:
            if at_end is not None:
                raise RuntimeError(at_end)

    def raises(error: Exception | None) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: raises(None if before is None else RuntimeError(before)))
    monkeypatch.setattr(cuda_graphs, "one_pass", lambda *args: raises(inside))


@pytest.mark.parametrize(
    ("inside", "at_end"),
    [
        (RuntimeError(CAPTURING), None),
        (RuntimeError(CAPTURING), INVALIDATED),
        (None, "CUDA error: capturing stream has unjoined work (cudaErrorStreamCaptureUnjoined)"),
        (RuntimeError("Cannot call CUDAGeneratorImpl::current_seed during CUDA graph capture"), None),
    ],
)
def test_a_pass_that_may_not_be_captured_is_refused_by_name(monkeypatch, inside, at_end):
    if inside is not None:
        inside.__context__ = KeyError("a cache without what a pass asks for")
    failing(monkeypatch, inside, at_end)
    with pytest.raises(UserError, match=r"cuda_graphs=true: this model's pass cannot be captured here .*set cuda_graphs=false"):
        capture()


@pytest.mark.parametrize(
    ("inside", "at_end", "before"),
    [
        (None, None, ECC),
        (RuntimeError(ECC), None, None),
        (RuntimeError(ECC), INVALIDATED, None),
        (torch.OutOfMemoryError("CUDA out of memory"), None, None),
        (torch.OutOfMemoryError("CUDA out of memory"), INVALIDATED, None),
    ],
)
def test_a_device_that_fails_meanwhile_is_no_fault_of_the_recipe(monkeypatch, inside, at_end, before):
    failing(monkeypatch, inside, at_end, before)
    with pytest.raises(RuntimeError) as raised:
        capture()
    assert not isinstance(raised.value, UserError)


def capture() -> None:
    nothing: Any = None
    MicroBatchGraphs(CPU)._capture(nothing, nothing, nothing, True)
