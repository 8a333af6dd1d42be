"""The distributed optimizer's state as sharded tensors: each rank saves and loads just the slices that it owns, and any layout can read them.

The distributed optimizer cuts the flat run of all weights evenly over the data-parallel ranks, so a rank owns a flat range [start, stop) of a
weight. Such a range of an n-dimensional tensor is a few boxes (part of a row, whole rows, part of a row), and a box is what torch_dist stores.
Stored are the global tensors `optimizer.state.{param, exp_avg, exp_avg_sq}.<model key>`, in the model's own shapes, as megatron-core's
"fully_reshardable" format stores them. That format itself is not used, for two reasons (megatron-core 0.16.1): it gathers the whole state on one
rank or on all (96 GB for 8B parameters), and it counts offsets without the padding between gradient buckets (distrib_optimizer.py:977 against
param_and_grad_buffer.py:638), so that a model whose first bucket is padded is saved shifted, with no more than a warning: a tied embedding under
pipeline parallelism is such a bucket.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_prism.engine.fp8_params import is_fp8
from megatron_prism.engine.optimizer import Optimizer

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and size of an n-dimensional slice."""
FP8 = "fp8"


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The flat range [start, stop) of a tensor of `shape`, cut into boxes; in flat order, each contiguous."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # inside one row
        yield from _in_row(shape, last, start - last * row, stop - last * row)
        return
    if first * row > start:
        yield from _in_row(shape, first - 1, start - (first - 1) * row, row)
    if last > first:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if stop > last * row:
        yield from _in_row(shape, last, 0, stop - last * row)


def _in_row(shape: Sequence[int], index: int, start: int, stop: int) -> Iterator[Box]:
    for offset, size in boxes(shape[1:], start, stop):
        yield (index, *offset), (1, *size)


def own_state(optimizer: Optimizer) -> Iterator[tuple[Any, torch.nn.Parameter, int, int]]:
    """(distributed optimizer, weight, start, stop) for each weight of which this rank owns the flat range [start, stop)."""
    for part in optimizer.chained_optimizers:
        ranges = itertools.chain.from_iterable(by_dtype.values() for by_dtype in part.gbuf_ranges)
        for bucket in itertools.chain.from_iterable(ranges):
            for weight, place in bucket["param_map"].items():
                yield part, weight, place["param"].start, place["param"].end


def by_weight(model_state: dict[str, Any]) -> dict[int, Any]:
    """The sharded tensor of each weight, by the weight's id; in place of FP8, whose tensors cannot be cut, one of its shape without memory."""

    def plain(item: Any) -> Any:
        return replace(item, data=torch.empty(item.data.shape, dtype=item.data.dtype, device="meta")) if is_fp8(item.data) else item

    return {id(item.data): plain(item) for item in nested_values(model_state)}


def sharded_slices(
    metadata: ShardedTensor | ShardedTensorFactory, start: int, stop: int, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[ShardedTensor, int, int]]:
    """The boxes of a weight's flat range, stored in a type: (sharded tensor without data, start and stop in the weight).

    A factory (gate and up projection in one weight) stores several tensors, each a contiguous part of the weight.
    """
    parts = list(nested_values(metadata.build())) if isinstance(metadata, ShardedTensorFactory) else [metadata]
    for part in parts:
        begin = part.data.storage_offset() - metadata.data.storage_offset()
        inside_start, inside_stop = max(start - begin, 0), min(stop - begin, part.data.numel())
        done = begin + inside_start
        for offset, size in boxes(part.local_shape, inside_start, inside_stop):
            length = math.prod(size)
            yield _box_of(part, offset, size, dtype), done, done + length
            done += length


def _box_of(part: ShardedTensor, offset: tuple[int, ...], size: tuple[int, ...], dtype: torch.dtype) -> ShardedTensor:
    """One box of a stored tensor. axis_fragmentations=None: an uneven cut, whose cover of the whole torch checks at save."""
    leading = part.prepend_axis_num
    place = (*part.global_offset[:leading], *(a + b for a, b in zip(part.global_offset[leading:], offset, strict=True)))
    return replace(
        part,
        data=None,
        dtype=dtype,
        local_shape=(*(1 for _ in range(leading)), *size),
        global_offset=place,
        axis_fragmentations=None,
        prepend_axis_num=0,
        # copies over tensor- and pipeline-parallel ranks stay copies; over data-parallel ranks each holds another part
        replica_id=(*part.replica_id[:2], 0),
    )


def _owned(part: Any, weight: torch.nn.Parameter) -> Tensor:
    """The flat range of a weight that this rank updates."""
    group, order = part.model_param_group_index_map[weight]
    owned: Tensor = part.optimizer.param_groups[group]["params"][order]
    return owned


def _room_for(value: Tensor, weight: Tensor) -> Tensor:
    """Where a loaded value goes: in its place if that is host memory (or a copy made there), else beside it, where the device may have no room.

    An fp32 weight is its own master, and is loaded as a weight too, perhaps rounded: the master comes after it, from room of its own.
    """
    in_place = value.device.type == "cpu" and value.data_ptr() != weight.data_ptr()
    return value if in_place else torch.empty(value.shape, dtype=torch.float32, device="cpu")


class OptimizerState:
    """The optimizer's state of this rank, in a form that megatron-core's dist_checkpointing saves, or fills."""

    def __init__(self, optimizer: Optimizer, model_state: dict[str, Any], loading: bool) -> None:
        known = by_weight(model_state)
        self.tensors: dict[str, ShardedTensor] = {}
        self._loaded: list[tuple[Any, torch.nn.Parameter, dict[str, Tensor]]] = []
        for part, weight, start, stop in own_state(optimizer):
            owned = _owned(part, weight)
            held = {name: value.detach() for name, value in part.optimizer.values(owned).items()}
            tensors = {name: _room_for(value, owned) for name, value in held.items()} if loading else held
            if loading:
                self._loaded.append((part, weight, tensors))
            self._add(known[id(weight)], tensors, start, stop)

    def _add(self, metadata: Any, tensors: dict[str, Tensor], start: int, stop: int) -> None:
        for slice_, begin, end in sharded_slices(metadata, start, stop):
            for name, tensor in tensors.items():
                data = tensor.view(-1)[begin - start : end - start].view(slice_.local_shape)
                key = f"optimizer.state.{name}.{slice_.key}"
                self.tensors[f"{key} {slice_.global_offset}"] = replace(slice_, key=key, data=data)

    @torch.no_grad()
    def apply(self, loaded: dict[str, Tensor]) -> None:
        """Hand loaded slices to the optimizer: its master weights and moments."""
        _fill(self.tensors, loaded)
        for part, weight, tensors in self._loaded:
            part.optimizer.put(_owned(part, weight), tensors)


def by_ranges(optimizer: Optimizer, item: Any) -> bool:
    """Whether each rank saves and loads the range of this weight that it owns, and not one rank the weight: under `fp8.params` the layers' matrices.

    Not FP8 ones alone: layers that stay in bf16 share a global tensor with those in FP8, and one tensor is cut in one way.
    """
    return optimizer.fp8_params and getattr(item, "key", "").startswith("decoder.layers.") and getattr(getattr(item, "data", None), "ndim", 0) > 1


class Fp8WeightState:
    """The layers' matrices of a model that keeps them in FP8 alone, as a checkpoint has any weight: in bf16, under the model's own keys.

    FP8 ones are made of masters, of which each rank saves and loads those that it owns.
    """

    def __init__(self, optimizer: Optimizer, model_state: dict[str, Any], loading: bool) -> None:
        known = by_weight(model_state)
        self.tensors: dict[str, ShardedTensor] = {}
        self._values: list[tuple[Tensor, Tensor]] = []
        for part, weight, start, stop in own_state(optimizer):
            metadata = known[id(weight)]
            if not by_ranges(optimizer, metadata):
                continue
            master = _owned(part, weight)  # of a bf16 weight its own range
            dtype = torch.bfloat16 if is_fp8(weight) else master.dtype
            value = torch.empty(master.shape, dtype=dtype, device="cpu") if loading else master.detach().to(dtype).cpu()
            self._values.append((master, value))
            for slice_, begin, end in sharded_slices(metadata, start, stop, dtype):
                data = value[begin - start : end - start].view(slice_.local_shape)
                self.tensors[f"{slice_.key} {slice_.global_offset}"] = replace(slice_, data=data)

    @property
    def entry(self) -> dict[str, Any]:
        """For a sharded state dict; none where there is nothing of it."""
        return {FP8: self.tensors} if self.tensors else {}

    @torch.no_grad()
    def apply(self, loaded: dict[str, Tensor]) -> None:
        """Make masters of loaded slices; FP8 is to be made of them after it, and all gathered."""
        _fill(self.tensors, loaded)
        for master, value in self._values:
            master.copy_(value)


def _fill(tensors: dict[str, ShardedTensor], loaded: dict[str, Tensor]) -> None:
    """Copy loaded slices to their places, where they were not loaded in place."""
    for name, tensor in loaded.items():
        data = tensors[name].data
        assert data is not None
        if data.data_ptr() != tensor.data_ptr():
            data.copy_(tensor)
