"""What recomputed layers keep, and where: attention's output beside the layer's input, on the device or in host memory.

Two additions to megatron-core's full recomputation, for long sequences. Attention's core costs a number of operations that grows with the square of
the length, and its output no more than the layer's input: kept, the core runs once. And what is kept is next needed when the whole backward pass has
come back to its layer: until then it may lie in host memory (`Offload`), whose copies overlap with the layers between.

Owns: `install`, called once for a chunk of the model. Plain where there is no CUDA: a copy is a copy.
"""

import functools
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

MIN_BYTES = 1 << 20
"""smaller tensors stay on the device: a copy would cost more than it frees"""


def install(chunk: torch.nn.Module, keep_attention: bool, offload: bool) -> None:
    """Make the layers of a chunk, all of them recomputed, keep attention's output; and move what they keep to host memory."""
    store = Offload() if offload else None
    decoder: Any = chunk.decoder
    if store is not None:
        # what calls the layers: that which recomputes saves their inputs
        for part in [decoder] if isinstance(decoder, TransformerBlock) else decoder.layers:
            part.__class__ = _offloading(part.__class__)
            part.store = store
        if isinstance(decoder, TransformerBlock) and decoder.final_layernorm is not None:  # its backward pass comes at once
            decoder.final_layernorm.register_forward_pre_hook(lambda *_: store.close())
    for layer in decoder.layers:
        core: Any = getattr(getattr(layer, "self_attention", None), "core_attention", None)  # a hybrid's other layers have none
        if keep_attention and core is not None:
            core.__class__ = _keeping(core.__class__)
            core.records, core.store = deque(), store


class Parked:
    """A tensor in host memory. It comes back when asked for, or when what was parked after it does, a layer ahead of its use."""

    def __init__(self, tensor: Tensor, stream: Any, before: "Parked | None") -> None:
        self.stream, self.device = stream, tensor.device
        self.before = weakref.ref(before) if before is not None else lambda: None
        self.back: Tensor | None = None
        self.host = torch.empty_like(tensor, device="cpu", pin_memory=stream is not None)  # dense tensors keep their strides
        if stream is None:
            self.host.copy_(tensor)
            return
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)

    def fetch(self) -> None:
        """Start its way back."""
        if self.back is not None:
            return
        if self.stream is None:
            self.back = self.host.clone()
            return
        self.stream.wait_stream(torch.cuda.current_stream())  # what is free on the one must be free on the other
        with torch.cuda.stream(self.stream):
            self.back = self.host.to(self.device, non_blocking=True)
        self.arrived = self.stream.record_event()

    def get(self) -> Tensor:
        """The tensor on its device."""
        self.fetch()
        assert self.back is not None
        if self.stream is not None:
            torch.cuda.current_stream().wait_event(self.arrived)
            self.back.record_stream(torch.cuda.current_stream())
        before = self.before()
        if before is not None:
            before.fetch()
        return self.back


class Offload:
    """Parks tensors on a stream of its own, and brings them back in the opposite order."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream() if torch.cuda.is_initialized() else None
        self.newest: weakref.ref[Parked] | None = None
        self.is_open = False
        """whether what is saved now waits for long"""

    def close(self) -> None:
        """What is saved from now on is needed soon."""
        self.is_open = False

    def park(self, tensor: Tensor) -> Parked:
        """Copy to the host; the caller lets go of the tensor."""
        parked = Parked(tensor, self.stream if tensor.is_cuda else None, self.newest() if self.newest is not None else None)
        self.newest = weakref.ref(parked)
        return parked


def _unpark(held: "Tensor | Parked") -> Tensor:
    return held.get() if isinstance(held, Parked) else held


@functools.cache
def _offloading(kind: Any) -> type:
    """A decoder or a layer of a kind, in which hidden states that wait for the backward pass go to host memory."""

    def within(self: Any, *args: Any, **kwargs: Any) -> Any:
        def pack(tensor: Tensor) -> Tensor | Parked:
            hidden = tensor.ndim == 3 and tensor.shape[-1] == self.config.hidden_size  # not the angles of RoPE, which all layers share
            return self.store.park(tensor) if self.store.is_open and hidden and _is_large(tensor) else tensor

        self.store.is_open = True
        with saved_tensors_hooks(pack, _unpark):
            return kind.forward(self, *args, **kwargs)

    return type(f"Offloading{kind.__name__}", (kind,), {"forward": within})


def _is_large(tensor: Tensor) -> bool:
    return tensor.numel() * tensor.element_size() >= MIN_BYTES


@dataclass
class Record:
    """One pass of an attention core: its graph, in which queries, keys and values are empty places until they are computed again."""

    inputs: tuple[Tensor, ...]
    """as the core saw them; dropped when it is done"""
    keep: Callable[[Tensor], Tensor | Parked]
    starts: list[GradientEdge] = field(default_factory=list)
    end: GradientEdge | None = None
    output: Tensor | Parked | None = None
    shape: torch.Size | None = None
    kept: dict[int, tuple[Tensor, Tensor | Parked]] = field(default_factory=dict)
    """dense tensors that the graph holds beside its inputs, by address, while the core runs: none is freed meanwhile, and its address used again"""

    def pack(self, tensor: Tensor) -> "tuple[int, Any] | Tensor | Parked":
        """Of a tensor that the graph saves: which input it is and how it lies there, or the tensor, kept."""
        for place, given in enumerate(self.inputs):
            if tensor.data_ptr() == given.data_ptr() and tensor.numel() == given.numel():
                return place, (tensor.size(), tensor.stride(), given.stride())
        held = self.keep(tensor)
        if _extent(tensor) == tensor.numel():
            self.kept[tensor.data_ptr()] = tensor, held
        return held

    def unpack(self, held: Any) -> Tensor:
        """The tensor again, an input from the second computation."""
        if not isinstance(held, tuple):
            return _unpark(held)
        place, (size, stride, given) = held
        again = self.inputs[place]
        assert again.stride() == given, "a layer that runs twice lays out its tensors alike"
        return again.as_strided(size, stride)

    def keep_output(self, output: Tensor) -> None:
        """Keep what the core gave; once, where its own graph has saved it too, as another shape of the same memory."""
        saved, held = self.kept.get(output.data_ptr(), (None, None))
        assert output.is_contiguous()
        self.output = held if saved is not None and saved.numel() == output.numel() else self.keep(output.detach())
        self.shape = output.shape


def _extent(tensor: Tensor) -> int:
    """Elements from a tensor's first to its last, in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))


class _Enter(torch.autograd.Function):
    """Queries, keys and values as the beginning of a graph, which holds on to none of them."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise AssertionError("a record's backward pass ends at its beginning")


class _Replay(torch.autograd.Function):
    """The kept output; its gradient goes through the graph of the first pass."""

    @staticmethod
    def forward(ctx: Any, record: Record, *inputs: Tensor) -> Tensor:
        assert record.output is not None and record.shape is not None
        ctx.record = record
        record.inputs = tuple(x.detach() for x in inputs)
        output = _unpark(record.output)
        return output.as_strided(record.shape, torch.empty(record.shape, device="meta").stride())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        record: Record = ctx.record
        assert record.end is not None
        return None, *torch.autograd.grad([record.end], record.starts, [gradient])


class KeepsOutput(torch.nn.Module):
    """An attention core that runs once although its layer runs twice.

    Layers run first without gradients, then with them, the micro-batches in the same order: records are a queue.
    """

    records: deque[Record]
    store: Offload | None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the core's own."""
        core: Any = super()
        if torch.is_grad_enabled() and self.records:
            replayed: Tensor = _Replay.apply(self.records.popleft(), query, key, value)
            return replayed
        if torch.is_grad_enabled() or not self.training:  # a layer that is not recomputed, or an evaluation
            plain: Tensor = core.forward(query, key, value, *args, **kwargs)
            return plain
        record = Record((query, key, value), self._keep)
        with torch.enable_grad(), saved_tensors_hooks(record.pack, record.unpack):
            inputs = _Enter.apply(torch.empty((), requires_grad=True), query, key, value)
            output: Tensor = core.forward(*inputs, *args, **kwargs)
        record.starts, record.end = [get_gradient_edge(x) for x in inputs], get_gradient_edge(output)
        record.keep_output(output)
        record.inputs, record.kept = (), {}
        self.records.append(record)
        return output.detach()

    def _keep(self, tensor: Tensor) -> Tensor | Parked:
        return self.store.park(tensor) if self.store is not None and _is_large(tensor) else tensor


@functools.cache
def _keeping(core: Any) -> type:
    """The core of a kind, with its output kept."""
    return type(f"Keeping{core.__name__}", (KeepsOutput, core), {})
