"""Started on two ranks that share one GPU, which NCCL refuses: `layout_runs.py` over gloo, with DDP's collectives through host memory."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer

from megatron_prism.engine import parallel


def gather(output: torch.Tensor, own: torch.Tensor, group: Any, async_op: bool) -> None:
    host = torch.empty(output.shape, dtype=output.dtype)
    dist.all_gather_into_tensor(host, own.cpu(), group=group)
    output.copy_(host)


def scatter(output: torch.Tensor, everything: torch.Tensor, op: Any, group: Any, async_op: bool) -> None:
    """The sum of the ranks' values, in the order of the ranks."""
    host = everything.cpu()
    parts = [torch.empty_like(host) for _ in range(group.size())]
    dist.all_gather(parts, host, group=group)
    place = group.rank() * output.numel()
    output.copy_(sum(part[place : place + output.numel()] for part in parts))


@contextlib.contextmanager
def one_by_one(group: Any, async_ops: bool = False) -> Iterator[Any]:
    yield SimpleNamespace(wait=lambda: None)


if __name__ == "__main__":
    os.environ["LOCAL_RANK"] = "0"
    sys.path.insert(0, str(Path(__file__).parents[1] / "laws"))
    import layout_runs

    with (
        mock.patch.object(parallel, "backend", lambda device: "gloo"),
        mock.patch.object(param_and_grad_buffer, "dist_all_gather_func", gather),
        mock.patch.object(param_and_grad_buffer, "dist_reduce_scatter_func", scatter),
        mock.patch.object(param_and_grad_buffer, "_coalescing_manager", one_by_one),
    ):
        layout_runs.main()
