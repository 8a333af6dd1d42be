"""CUDA graphs on one GPU: a run with them is the eager run, bit for bit, with evaluations and a resume between, and after a load in its middle.

Everything runs in this process, with sums in a fixed order; steps 1 and 2 are eager, step 3 captures.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY
from training import VOCAB_SIZE, differing, final_state, from_random, recipe

from megatron_prism.config import load_recipe
from megatron_prism.engine import checkpoint, loop, parallel, recovery, run_folder
from megatron_prism.engine.cuda_graphs import MicroBatchGraphs
from megatron_prism.engine.recipe import TrainConfig
from megatron_prism.kernels.causal_attention import fused

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64}
IN_SIXTEENS = {"hidden_size": 128, "mamba_n_heads": 16}
"""the hybrid: FP8 wants multiples"""
KINDS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "tensorwise": {"fp8__recipe": "tensorwise"},
    "fp8_params": {"fp8__recipe": "tensorwise", "fp8__params": True},
    "delayed": {"fp8__recipe": "delayed", "fp8__amax_history_len": 4},
    "blockwise": {"fp8__recipe": "blockwise"},
    "small_states": {"optimizer__moments": "bf16", "optimizer__split_master": True, "optimizer__gradients": "bf16"},
    "local": {"layers": "local"},
    "attention": {"trainable": "attention"},
    "hybrid": {},
    "hybrid_tensorwise": {"fp8__recipe": "tensorwise"},
}
if fused.installed() is not None:
    KINDS["flash"] = {"attention_backend": "flash"}  # by name: `auto` takes cuDNN in deterministic mode
CASES = [(kind, 3) for kind in KINDS] + [(kind, 1) for kind in ("bf16", "tensorwise", "fp8_params", "delayed", "hybrid")]
STEPS, SAVED = 6, 3

Runs = Callable[[str, int, bool], Path]


@pytest.fixture(scope="module", autouse=True)
def sums_in_a_fixed_order() -> Iterator[None]:
    """As `deterministic=true` leaves a process, for these tests alone."""
    before = dict(os.environ)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    parallel.stop()
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def model_files(root: Path, kind: str) -> dict[str, str]:
    if not kind.startswith("hybrid"):
        return from_random(root, **SHAPE)
    folder = root / "hybrid"
    if not folder.exists():
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**TINY["granite_hybrid"], **IN_SIXTEENS, "vocab_size": VOCAB_SIZE}))
        (folder / "tokenizer.json").write_text("{}")
    return {"model__hf_config": str(folder), "model__tokenizer": str(folder)}


def config(root: Path, output: Path, kind: str, micro_batches: int, graphs: bool, **more: Any) -> TrainConfig:
    settings = {"steps": STEPS, "global_batch": micro_batches, "precision": "bf16", "device": "cuda", "deterministic": True, "watchdog": None}
    saves = {"checkpoint__save_interval": SAVED, "checkpoint__keep_last": 10, "validation__interval": 2, "validation__batches": 1}
    words = recipe(root, output, **{**settings, **saves, **model_files(root, kind), **KINDS[kind], "cuda_graphs": graphs, **more})
    return load_recipe(None, words, TrainConfig)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture(scope="module")
def runs(root: Path) -> Runs:
    """The run of a kind with so many micro-batches a step, with or without graphs; made once."""

    def made(kind: str, micro_batches: int, graphs: bool) -> Path:
        output = root / f"{kind}_{micro_batches}_{graphs}"
        if not (output / "COMPLETE").exists():
            loop.train(config(root, output, kind, micro_batches, graphs))
        return output

    return made


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that were over when a graph was captured."""
    found: list[int] = []
    capture = MicroBatchGraphs._capture

    def counted(self: MicroBatchGraphs, *args: Any) -> Any:
        found.append(self.steps)
        return capture(self, *args)

    monkeypatch.setattr(MicroBatchGraphs, "_capture", counted)
    return found


def losses(run: Path) -> list[dict[str, float]]:
    """What each step and each validation gave."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "loss" in key or key in ("step", "grad_norm")} for line in lines]


@pytest.mark.parametrize(("kind", "micro_batches"), CASES)
def test_a_run_with_graphs_equals_an_eager_run(runs, captures, kind, micro_batches):
    eager, graphed = runs(kind, micro_batches, False), runs(kind, micro_batches, True)
    assert sum("grad_norm" in line for line in losses(eager)) == STEPS and sum("validation/loss" in line for line in losses(eager)) == STEPS // 2
    assert losses(graphed) == losses(eager)
    assert differing(final_state(graphed), final_state(eager)) == []
    assert captures == [2] * (2 if "fp8__recipe" in KINDS[kind] and micro_batches > 1 else 1), "once, whatever was evaluated between"


@pytest.mark.parametrize("kind", ["fp8_params", "delayed", "hybrid"])
def test_a_resumed_run_with_graphs_equals_an_unbroken_one(root, runs, kind):
    unbroken = runs(kind, 3, True)
    resumed = root / f"{kind}_resumed"
    shutil.copytree(unbroken, resumed)
    (resumed / "COMPLETE").unlink()
    checkpoint.remove(run_folder.step_folder(resumed, STEPS))
    loop.train(config(root, resumed, kind, 3, True))
    assert differing(final_state(resumed), final_state(unbroken)) == []


@pytest.mark.parametrize("kind", ["bf16", "tensorwise", "fp8_params", "delayed"])
def test_graphs_compute_with_weights_that_are_loaded_after_the_capture(root, runs, captures, kind):
    """As when a run goes back to a checkpoint: steps 4 to 6 twice, the second time nothing but replays, from the same start."""
    unbroken = runs(kind, 3, True)
    output = root / f"{kind}_twice"
    shutil.copytree(unbroken, output)
    (output / "COMPLETE").unlink()
    checkpoint.remove(run_folder.step_folder(output, STEPS))
    run = loop.build_run(config(root, output, kind, 3, True))
    ends = []
    captures.clear()
    for _ in range(2):
        for _ in range(STEPS - SAVED):
            loop._step(run)
        ends.append([weight.detach().clone() for weight in run.engine.model[0].parameters()])
        run.progress = checkpoint.load_all(run.engine, run_folder.step_folder(output, SAVED))
    run.close()
    assert len(captures) == (1 if kind == "bf16" else 2)
    assert all(torch.equal(first, second) for first, second in zip(*ends, strict=True))
    start = [weight.detach().clone() for weight in run.engine.model[0].parameters()]
    assert not all(torch.equal(end, begin) for end, begin in zip(ends[0], start, strict=True)), "the steps changed the weights"


@pytest.mark.parametrize("kind", ["bf16", "tensorwise", "fp8_params"])
def test_a_replay_of_a_bad_step_has_the_memory_of_the_graphs_and_training_goes_on(root, captures, monkeypatch, kind):
    """A weight is NaN for the length of step 4: the step is left out, and steps 5 and 6 are those of an eager run that left it out."""
    ends, taken = [], []
    find = recovery.origin.find
    monkeypatch.setattr(recovery.origin, "find", lambda *args: (taken.append(torch.cuda.memory_reserved()), find(*args))[1])
    for graphs in (False, True):
        run = loop.build_run(config(root, root / f"bad_{kind}_{graphs}", kind, 3, graphs, bad_steps__on_nan="skip"))
        for _ in range(SAVED):
            loop._step(run)
        weight = next(run.engine.model[0].parameters())
        before, reserved = weight.detach().clone(), torch.cuda.memory_reserved()
        weight.data.view(-1)[5] = torch.nan
        assert not loop._step(run).applied
        weight.data.copy_(before)
        for _ in range(2):
            assert loop._step(run).applied
        ends.append([weight.detach().clone() for weight in run.engine.model[0].parameters()])
        run.close()
    assert taken[1] < reserved, "the graphs' pool was given back"
    assert captures in ([2, 4], [2, 2, 4, 4])
    assert all(torch.equal(first, second) for first, second in zip(*ends, strict=True))


def test_a_pass_that_moved_is_captured_anew(root, captures):
    run = loop.build_run(config(root, root / "moved", "bf16", 1, True))
    for _ in range(3):
        loop._step(run)
    weight = next(weight for weight in run.engine.model[0].parameters() if weight.requires_grad)
    weight.main_grad = weight.main_grad.clone()
    loop._step(run)
    run.close()
    assert captures == [2, 3]
