"""Predicted memory and time against every H200 run of docs/benchmarks.md that states its settings (measured_runs.toml)."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from megatron_prism import families
from megatron_prism.config import as_overrides, merge, validate
from megatron_prism.engine.bench.cases import model_config
from megatron_prism.engine.recipe import TrainConfig
from megatron_prism.planning.layout import make_plan
from megatron_prism.planning.memory import memory
from megatron_prism.planning.step_time import step_time

HERE = Path(__file__).resolve().parent
RUNS = tomllib.loads((HERE / "measured_runs.toml").read_text())["run"]
BENCHMARKS = (HERE.parents[1] / "docs" / "benchmarks.md").read_text()
MEMORY_WITHIN, TIME_WITHIN = 0.10, 0.20


def predicted(run: dict[str, Any]) -> tuple[float, float]:
    """Milliseconds and GiB."""
    config = model_config(run["model"], run.get("vocab_size"))
    model = families.find(config).model_config(config)
    gpus, seq_len = run.get("gpus", 1), run.get("seq_len", 8192)
    rest = {"output": "o", "steps": 1, "global_batch": 1, "model": {"checkpoint": "c"}, "data": {"blend": "b", "seq_len": seq_len}}
    cfg = validate(merge(None, as_overrides({**rest, **run.get("set", {})})), TrainConfig, where="measured_runs.toml")
    batch = gpus // cfg.parallel.model_ranks * run.get("micro_batches", 1)
    plan = make_plan(model, cfg.parallel, gpus, seq_len, batch, 1)
    step = step_time(model, plan, seq_len, cfg.training, tp_comm_overlap=cfg.parallel.tp_comm_overlap)
    seconds = step.total - (step.optimizer + step.overhead if "part" in run else 0)
    return 1e3 * seconds, memory(model, plan, seq_len, cfg.training).total / 2**30


@pytest.fixture(scope="module")
def errors() -> list[tuple[dict[str, Any], float, float | None]]:
    """Of each run: the relative error of its time, and of its memory where that was measured."""
    found = []
    for run in RUNS:
        ms, gib = predicted(run)
        found.append((run, ms / run["step_ms"] - 1, gib / run["gib"] - 1 if "gib" in run else None))
    return found


def test_every_run_stands_in_the_benchmarks_with_its_time_and_memory():
    for run in RUNS:
        lines = [line for line in BENCHMARKS.splitlines() if run["line"] in line]
        assert len(lines) == 1, run["line"]
        rows = BENCHMARKS[BENCHMARKS.index(lines[0]) :][: len(lines[0]) + 160]  # a sentence may go on
        text = rows.replace(",", "")
        assert f"{run['step_ms']:g}" in text or f"{run['step_ms']:.1f}" in text, run["line"]
        assert "gib" not in run or f"{run['gib']:.1f}" in text, run["line"]


def test_time_is_within_a_fifth_of_what_was_measured(errors):
    """64 runs are predictions; rates, or the shape of a term, come from the six others."""
    assert [run["line"] for run, time, _ in errors if abs(time) > TIME_WITHIN] == []
    assert (len(errors), sum("fitted" in run for run, *_ in errors)) == (70, 6)


def test_time_of_the_code_as_it_is_now_is_within_a_tenth(errors):
    now = [time for run, time, _ in errors if "code" not in run and "fitted" not in run]
    assert len(now) == 51
    assert max(map(abs, now)) < 0.10
    assert sorted(map(abs, now))[25] < 0.035  # the median


def test_time_is_as_near_where_nothing_is_shared_with_the_run_whose_profile_gave_the_rates(errors):
    """Other than eight of LLaMA-3.1-8B's layers with 8,192 tokens in bf16 on one GPU: other models, lengths, precisions, layouts, vocabularies."""
    found = [time for run, time, _ in errors if "fitted" not in run and not _like_the_profiled(run)]
    assert len(found) == 55
    assert max(map(abs, found)) < TIME_WITHIN
    assert sorted(map(abs, found))[27] < 0.05


def _like_the_profiled(run: dict[str, Any]) -> bool:
    settings = (run["model"], run.get("vocab_size"), run.get("gpus", 1), run.get("seq_len", 8192))
    return settings == ("llama-3.1-8b:8", 32000, 1, 8192) and not any("fp8" in key for key in as_overrides(run.get("set", {})))


def test_memory_is_within_a_tenth_of_what_was_measured(errors):
    found = [memory for *_, memory in errors if memory is not None]
    assert len(found) == 42
    assert max(map(abs, found)) <= MEMORY_WITHIN


if __name__ == "__main__":  # the table of docs/plan.md
    for run in RUNS:
        ms, gib = predicted(run)
        held = f"{run['gib']:7.1f} {gib:7.1f} {gib / run['gib'] - 1:+6.1%}" if "gib" in run else " " * 22
        print(f"{run['step_ms']:10,.1f} {ms:10,.1f} {ms / run['step_ms'] - 1:+6.1%} {held} {run.get('code', ''):9} {run['line'][:60]}")
