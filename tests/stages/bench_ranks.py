"""On each of two ranks: a benchmark whose second case fails on both, and whose third fails on rank 1 while rank 0 waits for it."""

import sys
from pathlib import Path

import torch.distributed as dist

from megatron_prism.engine.bench import measure
from megatron_prism.engine.bench.cases import Config
from megatron_prism.stages import bench

measure.PATIENCE_SECONDS = 8
whole = measure.Bench._case


def failing(self: measure.Bench, case, traces):
    if case.name == "both":
        raise RuntimeError("everywhere")
    if case.name == "apart" and dist.get_rank() == 1:
        raise RuntimeError("only here")
    if case.name == "apart":
        dist.barrier()  # as in a step that the other never takes
    return whole(self, case, traces)


measure.Bench._case = failing
root = Path(sys.argv[1])
bench.run(
    Config(
        output=root / "bench",
        model=str(root / "model"),
        micro_batches=2,
        warmup=1,
        steps=1,
        rounds=1,
        train={"data": {"seq_len": 32}, "device": "cpu", "precision": "fp32"},
        cases=[{"name": "split", "baselines": ["bare_megatron_core"]}, {"name": "both"}, {"name": "apart"}],
    )
)
