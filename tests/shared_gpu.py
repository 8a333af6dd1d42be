"""Several ranks on one GPU, for tests: NCCL takes a GPU once, so they exchange over gloo, through host memory.

    import shared_gpu; shared_gpu.share()     (in each rank, before torch.distributed starts)

What a test proves this way: layouts, kernels, what is exchanged. Not: NCCL, work beside exchanges and the order of streams (each exchange is over
when it returns), rounding of sums in bf16 (they are made in fp32). Owns: torch.distributed's functions on tensors that are not in host memory (gloo
has only some of them there), the device of every rank, the process groups' backend. Nothing here is part of the package.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prism.engine import parallel

NAMES = (
    "all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "_all_gather_base", "reduce_scatter_tensor", "_reduce_scatter_base",
    "all_to_all_single", "batch_isend_irecv", "_coalescing_manager",
)  # fmt: skip
REAL: dict[str, Callable[..., Any]] = {name: getattr(dist, name) for name in NAMES}
everything = False


class Done:
    """An exchange that is over, or that is once `finish` has been called."""

    def __init__(self, finish: Callable[[], None] | None = None) -> None:
        self.finish = finish

    def wait(self, *_: Any) -> bool:
        if self.finish is not None:
            self.finish, finish = None, self.finish
            finish()
        return True


def share(host_too: bool = False) -> None:
    """Take device 0 on every rank, exchange over gloo, move tensors through host memory. host_too: copies of those that are there already as well."""
    global everything
    everything = host_too
    os.environ["LOCAL_RANK"] = "0"
    parallel.backend = lambda device: "gloo"
    ours: dict[int, Callable[..., Any]] = {id(REAL[name]): globals()[name] for name in NAMES}
    for owner in [dist, *(module for name, module in list(sys.modules.items()) if name.startswith(("megatron", "transformer_engine")))]:
        for name, value in list(vars(owner).items()):
            if id(value) in ours:  # megatron-core keeps some under names of its own
                setattr(owner, name, ours[id(value)])


def to_host(tensor: Tensor, summed: bool = False) -> Tensor:
    """A copy in host memory; of bf16 that is to be summed in fp32, so that two ranks' sum is rounded once."""
    host = tensor.detach().to("cpu", copy=True).contiguous()
    return host.float() if summed and host.dtype in (torch.bfloat16, torch.float16) else host


def stays(tensor: Tensor) -> bool:
    """Whether gloo can take it as it is."""
    return tensor.device.type == "cpu" and not everything


def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
    if stays(tensor):
        return REAL["all_reduce"](tensor, op, group, async_op)
    host = to_host(tensor, summed=True)
    REAL["all_reduce"](host, op, group)
    tensor.detach().copy_(host)
    return Done() if async_op else None


def reduce(tensor: Tensor, dst: int | None = None, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False, **place: Any) -> Any:
    if stays(tensor):
        return REAL["reduce"](tensor, dst, op, group, async_op, **place)
    host = to_host(tensor, summed=True)
    REAL["reduce"](host, dst, op, group, **place)
    if dist.get_rank() == dst:
        tensor.detach().copy_(host)
    return Done() if async_op else None


def broadcast(tensor: Tensor, src: int | None = None, group: Any = None, async_op: bool = False, group_src: int | None = None) -> Any:
    if stays(tensor):
        return REAL["broadcast"](tensor, src, group, async_op, group_src)
    host = to_host(tensor)
    REAL["broadcast"](host, src, group, False, group_src)
    tensor.detach().copy_(host)
    return Done() if async_op else None


def all_gather(tensor_list: list[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
    if stays(tensor):
        return REAL["all_gather"](tensor_list, tensor, group, async_op)
    hosts = gathered(tensor, group)
    for output, host in zip(tensor_list, hosts, strict=True):
        output.detach().copy_(host.view(output.shape))
    return Done() if async_op else None


def gathered(tensor: Tensor, group: Any) -> list[Tensor]:
    """Every rank's, in host memory."""
    host = to_host(tensor)
    hosts = [torch.empty_like(host) for _ in range(dist.get_world_size(group))]
    REAL["all_gather"](hosts, host, group)
    return hosts


def all_gather_into_tensor(output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
    if stays(output_tensor):
        return REAL["all_gather_into_tensor"](output_tensor, input_tensor, group, async_op)
    hosts = gathered(input_tensor, group)
    output_tensor.detach().copy_(torch.cat([host.flatten() for host in hosts]).view(output_tensor.shape))
    return Done() if async_op else None


def reduce_scatter_tensor(output: Tensor, input: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
    if stays(output):
        return REAL["reduce_scatter_tensor"](output, input, op, group, async_op)
    host = to_host(input, summed=True).flatten()
    REAL["all_reduce"](host, op, group)
    output.detach().copy_(host.chunk(dist.get_world_size(group))[dist.get_rank(group)].view(output.shape))
    return Done() if async_op else None


def all_to_all_single(
    output: Tensor, input: Tensor, output_split_sizes: Any = None, input_split_sizes: Any = None, group: Any = None, async_op: bool = False
) -> Any:  # fmt: skip
    if stays(output):
        return REAL["all_to_all_single"](output, input, output_split_sizes, input_split_sizes, group, async_op)
    host = torch.empty_like(output, device="cpu")
    REAL["all_to_all_single"](host, to_host(input), output_split_sizes, input_split_sizes, group)
    output.detach().copy_(host)
    return Done() if async_op else None


def batch_isend_irecv(p2p_op_list: list[Any]) -> list[Any]:
    """Through host memory: what was sent is copied now, what comes is copied when it is waited for."""
    found, operations = [], []
    for operation in p2p_op_list:
        if stays(operation.tensor):
            operations.append((operation, None))
            continue
        receives = operation.op is dist.irecv
        host = torch.empty_like(operation.tensor, device="cpu") if receives else to_host(operation.tensor)
        moved = dist.P2POp(operation.op, host, operation.peer, operation.group, operation.tag)
        operations.append((moved, operation.tensor if receives else None))
    for (moved, target), work in zip(operations, REAL["batch_isend_irecv"]([moved for moved, _ in operations]), strict=True):

        def finish(moved: Any = moved, target: Tensor | None = target, work: Any = work) -> None:
            work.wait()
            if target is not None:
                target.detach().copy_(moved.tensor)

        found.append(Done(finish))
    return found


@contextmanager
def _coalescing_manager(*_: Any, **__: Any) -> Iterator[Done]:
    """Nothing to put together: every exchange above is over when its function returns."""
    yield Done()


_all_gather_base, _reduce_scatter_base = all_gather_into_tensor, reduce_scatter_tensor
