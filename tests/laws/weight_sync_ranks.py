"""Started on N ranks by the law of weight sync: trains two steps under each case of a JSON file, saves, and streams the weights as they stand.

    weight_sync_ranks.py CASES.json
    CASES: {"common": ["key=value", ...], "fault": null, "cases": {"name": {"set": ["parallel.tp=2", ...], "dtype": "bfloat16" or null}}}

Written beside each run: NAME/first.pt, what rank 0 was given; NAME/all_RANK.json, the digests of what each rank was given with ranks="all".
"""

import json
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_prism.config import load_recipe
from megatron_prism.engine import loop, parallel, weight_sync
from megatron_prism.engine.recipe import TrainConfig
from megatron_prism.engine.weight_sync import weight_stream
from megatron_prism.engine.weights import to_dtype
from megatron_prism.generate.digests import digest

BUCKET_BYTES = 20_000
"""so small that a tiny model takes several, and that some tensor is larger"""


def stream(run: loop.Run, dtype: str | None) -> None:
    """Every way to go through a stream, also one that rank 0 leaves at once, after which the next must work."""
    settings = {"dtype": to_dtype(dtype), "bucket_bytes": BUCKET_BYTES}
    left = weight_stream(run.engine, run.model_config, **settings)
    assert len(list(islice(left, 2 if run.is_main else None))) == (2 if run.is_main else 0)
    left.close()
    found = {name: tensor.clone() for name, tensor in weight_stream(run.engine, run.model_config, **settings)}
    assert bool(found) == run.is_main
    if run.is_main:
        torch.save(found, run.cfg.output / "first.pt")
    digests = {name: digest(tensor) for name, tensor in weight_stream(run.engine, run.model_config, ranks="all", **settings)}
    (run.cfg.output / f"all_{dist.get_rank()}.json").write_text(json.dumps(digests))


def overlapping(wrap: Callable[..., Any]) -> Callable[..., Any]:
    """DDP as on CUDA: updated weights are gathered while the next forward pass runs."""
    return lambda *arguments, overlap: wrap(*arguments, overlap=True)


def main() -> None:
    """Every case in turn; the fault of all: "stale", weights that nobody gathered after the update."""
    plan = json.loads(Path(sys.argv[1]).read_text())
    for case in plan["cases"].values():
        with mock.patch.object(loop, "wrap_model", overlapping(loop.wrap_model) if case.get("overlap") else loop.wrap_model):
            run = loop.build_run(load_recipe(None, [*plan["common"], *case["set"]], TrainConfig))
        for _ in range(2):
            loop._step(run)
        if plan["fault"] == "stale":
            with mock.patch.object(weight_sync, "gather_weights", lambda engine: None):
                stream(run, case["dtype"])
        else:
            stream(run, case["dtype"])
        loop._save(run)
        run.close()
    parallel.stop()


if __name__ == "__main__":
    main()
