"""Bench: the engine's own training step, measured, and the baselines beside it: bench.json and a table. On any number of ranks under torchrun.

A case that fails (out of memory, say) is recorded with its message and the others go on; the command then ends with status 1, and the folder is not
COMPLETE; nor is it where `minutes` were over before a case. bench.json is written anew after each case, so that a run that is killed keeps what it
measured.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_prism import artifact
from megatron_prism.engine.bench import table
from megatron_prism.engine.bench.cases import Case, Config, resolve
from megatron_prism.planning import cost

__all__ = ["Config", "dry_run", "parents", "run"]

RESULTS, SCHEMA_VERSION = "bench.json", 1


def parents(cfg: Config) -> list[Path]:
    """The prep outputs whose blends are read; none for random tokens."""
    blends = [Path(blend) for _, case in cfg.each() if (blend := case.train.get("data", {}).get("blend"))]
    folders = dict.fromkeys(blend if blend.is_dir() else blend.parent for blend in blends)
    return [folder for folder in folders if artifact.is_complete(folder)]


def dry_run(cfg: Config) -> None:
    """Print what each case would build, for the ranks of this launch (WORLD_SIZE), else the fewest that all cases allow."""
    world_size = int(os.environ.get("WORLD_SIZE", cfg.fewest_ranks()))
    with tempfile.TemporaryDirectory() as folder:
        for case in resolve(cfg, world_size, Path(folder)):
            train = case.train
            sides = case.options.baselines if isinstance(case.options.baselines, str) else ", ".join(case.options.baselines)
            print(f"case         {case.name}: {case.options.warmup} + {case.options.steps} steps; baselines: {sides or 'none'}")
            print(cost.describe_run(case.model, case.plan, 1, train.global_batch, train.data.seq_len, train.training))
            print()


def run(cfg: Config) -> Path:
    """Measure every case, on every rank of the launch; returns the folder. Ends with status 1 where a case failed or was not begun."""
    with tempfile.TemporaryDirectory() as folder:
        cases = resolve(cfg, _world_size(), Path(folder))
        from megatron_prism.engine import device, parallel

        place = device.setup(cases[0].train.device)
        if cases[0].train.deterministic:
            device.make_deterministic()
        parallel.start(place)
        try:
            failed = _measure(cfg, cases, place)
        finally:
            parallel.stop()
    if failed:
        raise SystemExit(1)
    return cfg.output


def _measure(cfg: Config, cases: list[Case], place: Any) -> bool:
    """Whether any case failed, or time was up before it."""
    from megatron_prism.engine.bench.baselines import choose
    from megatron_prism.engine.bench.measure import Bench, CaseError, RanksApartError

    for case in cases:
        choose(case, place)
    bench, begun = Bench(place), time.monotonic()
    results: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "machine": bench.machine(), "conventions": table.CONVENTIONS, "cases": []}
    if bench.rank == 0:
        artifact.begin(cfg.output, "bench", cfg, parents(cfg))
    for number, case in enumerate(cases):
        if bench.as_rank_0(cfg.minutes is not None and time.monotonic() - begun > 60 * cfg.minutes):
            results["not_begun"] = [case.name for case in cases[number:]]
            break
        _write(cfg, bench, {**results, "running": case.name})
        apart = None
        try:
            found = bench.case(case, cfg.output / "traces")
        except (CaseError, RanksApartError) as error:
            found, apart = {"name": case.name, "failed": str(error)}, error if isinstance(error, RanksApartError) else None
        results["cases"].append(found)
        _write(cfg, bench, results)
        if bench.rank == 0:
            table.say(found)
        if apart is not None:
            print(f"error: rank {bench.rank}: {apart}", file=sys.stderr, flush=True)
            os._exit(1)  # leaving the process groups would wait for the others too
    failed = "not_begun" in results or any(table.failures(case) for case in results["cases"])
    _write(cfg, bench, results)
    if bench.rank == 0:
        if not failed:
            artifact.complete(cfg.output)
        table.show(results, cfg.output / RESULTS)
    return failed


def _write(cfg: Config, bench: Any, results: dict[str, Any]) -> None:
    if bench.rank == 0:
        artifact.write_atomic(cfg.output / RESULTS, json.dumps(results, indent=1) + "\n")


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
