"""The sides of a benchmark: something that takes training steps. Ours here; each baseline in a file of its own.

Owns: what a side is, our engine stepped through the functions of `prism train`, and giving its memory back.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_prism.data_prep.blend import load_blend
from megatron_prism.engine import loop
from megatron_prism.engine.bench.cases import Case
from megatron_prism.engine.bench.clock import Timeline
from megatron_prism.engine.data import MicroBatch, SampleReader
from megatron_prism.engine.fp8_params import transposes
from megatron_prism.engine.parallel import Mesh
from megatron_prism.engine.step import train_step
from megatron_prism.errors import UserError


class Side(Protocol):
    """One way to train the model of a case. It is built with its weights and its optimizer on the device."""

    timeline: Timeline
    notes: list[str]
    """what a reader of its figures should know"""

    def step(self) -> None:
        """One training step on one global batch, as it would be taken in training."""

    def loss(self) -> float:
        """Of the last step; may wait for the device."""

    def parameters(self) -> int:
        """Weights on this rank."""

    def close(self) -> None:
        """Give the memory back."""


class Ours:
    """Our engine, stepped by `train_step` with the data of the case."""

    def __init__(self, case: Case, mesh: Mesh, device: torch.device) -> None:
        self.case, self.timeline, self.notes = case, Timeline(device), list[str]()
        self.reader = read(case)
        self.data: Any = TimedReader(self.reader, self.timeline)
        self.engine = loop.build_engine(case.train, case.model, mesh, device)
        self.notes += [self.engine.attention] if device.type == "cuda" else []
        if case.train.check_memory:
            self.engine.optimizer.check_memory(device)
        self.engine.optimizer.initialize()  # the states, which a first step would make after its peak: with one step of warm-up nobody would see both
        timed: Any = TimedOptimizer(self.engine.optimizer, self.timeline)
        self.stepped = replace(self.engine, optimizer=timed)
        for chunk in self.engine.model:
            time_schedule(chunk.config, self.timeline)
        self.sample, self.last_loss = 0, float("nan")

    def step(self) -> None:
        """As `prism train` takes it, at a constant learning rate."""
        settings = self.case.train.optimizer
        report = train_step(self.stepped, self.data, self.sample, settings.lr, settings.weight_decay)
        self.sample += self.case.train.global_batch
        self.last_loss = report.loss if report.applied else math.nan  # a step that changed nothing did not take an update's time

    def loss(self) -> float:
        """Of the last step, over all ranks."""
        return self.last_loss

    def parameters(self) -> int:
        """Of this rank's chunks."""
        return sum(weight.numel() for chunk in self.engine.model for weight in chunk.parameters())

    def close(self) -> None:
        """End the reader's thread, free the model."""
        self.reader.close()
        if self.engine.graphs is not None:
            self.engine.graphs.forget()
        free(self.engine.model, self.engine.optimizer)


def read(case: Case) -> SampleReader:
    """The training split of the case's blend. Errors: UserError for tokens that the model lacks, and for packing."""
    data = case.train.data
    if data.packing is not None:
        raise UserError("data.packing: packed documents are not measured yet, the baselines have none; set data.packing=none")
    reader = SampleReader(load_blend(data.blend), "train", data.seq_len, data.mask_end_of_document)
    if reader.vocab_size > case.model.vocab_size:
        raise UserError(f"data.blend has token ids up to {reader.vocab_size - 1}, the model of the case knows {case.model.vocab_size}")
    return reader


class TimedReader:
    """A SampleReader whose steps say how long they kept the device waiting."""

    def __init__(self, reader: SampleReader, timeline: Timeline) -> None:
        self.reader, self.timeline = reader, timeline
        self.names, self.seq_len = reader.names, reader.seq_len

    @property
    def waited_seconds(self) -> float:
        """As SampleReader's."""
        return self.reader.waited_seconds

    def step(self, *place: Any) -> Iterator[MicroBatch]:
        """As SampleReader.step."""
        stream = self.reader.step(*place)
        while True:
            with self.timeline.span("data"):
                batch = next(stream, None)
            if batch is None:
                return
            yield batch


class TimedOptimizer:
    """Our optimizer, whose `step` is timed; all else is the optimizer's own."""

    def __init__(self, optimizer: Any, timeline: Timeline) -> None:
        self.optimizer, self.timeline = optimizer, timeline

    def step(self, *arguments: Any) -> Any:
        """As Optimizer.step."""
        with self.timeline.span("optimizer"):
            return self.optimizer.step(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


def time_schedule(config: Any, timeline: Timeline) -> None:
    """Have megatron-core's schedule time forward and backward of each micro-batch, and the gradients' last reduction."""
    finish: Callable[..., Any] = config.finalize_model_grads_func

    def timed(*arguments: Any, **options: Any) -> None:
        with timeline.span("reduction"):
            finish(*arguments, **options)

    config.timers, config.finalize_model_grads_func = timeline, timed


def free(chunks: Iterable[DistributedDataParallel], optimizer: Any) -> None:
    """Empty the memory of wrapped chunks and their optimizer, whoever still refers to them.

    DDP's gradient hooks, the schedule's functions on the config and a failed step's traceback each keep a model alive for longer than its owner.
    """
    tensors: list[Any] = []
    for chunk in chunks:
        chunk.config.timers = chunk.config.finalize_model_grads_func = chunk.config.grad_scale_func = chunk.config.no_sync_func = None
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            tensors += [buffer.grad_data, buffer.param_data]
        tensors += [*chunk.parameters(), *chunk.module.buffers(), *transposes(chunk.parameters())]
        for module in chunk.modules():
            getattr(module, "_fp8_workspaces", {}).clear()  # TransformerEngine's FP8 copies of the weights
    for part in optimizer.chained_optimizers:
        inner = part.optimizer
        tensors += [weight for group in inner.param_groups for weight in group["params"]]
        tensors += [value for state in inner.state.values() for value in state.values()]
    for tensor in tensors:
        if type(tensor) in (Tensor, torch.nn.Parameter):
            tensor.grad = None
            if tensor.untyped_storage().resizable():
                tensor.untyped_storage().resize_(0)
