"""Started on N ranks by the laws: trains a few steps under each case of a JSON file, all from one checkpoint, in one launch.

    layout_runs.py CASES.json
    CASES: {"common": ["key=value", ...], "cases": {"name": {"set": ["parallel.tp=2", ...], "fault": null}}}

Metrics lie in each case's own output folder. A fault plants a defect for the length of its case: the laws must turn red under it.
"""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_prism.config import load_recipe
from megatron_prism.engine import checkpoint, context_parallel, data, loop, loss, model, optimizer, parallel, step
from megatron_prism.engine.context_parallel import Chunk, chunks
from megatron_prism.engine.cuda_graphs import MicroBatchGraphs
from megatron_prism.engine.data import MicroBatch
from megatron_prism.engine.recipe import TrainConfig
from megatron_prism.kernels.linear_cross_entropy import linear_cross_entropy


def mean_of_means(batch: MicroBatch, num_sources: int) -> loss.LossParts:
    """Each micro-batch's own mean, weighed alike."""
    right = loss.masked_loss(batch, num_sources)

    def reduce(loss_bs: Tensor) -> loss.LossParts:
        total, tokens, report = right(loss_bs)
        return total / tokens, torch.ones_like(tokens), report

    return reduce


def load_with_one_step_tensor(engine: step.Engine, folder: Path, **options: Any) -> checkpoint.Progress:
    """As megatron-core would leave torch's Adam after a load: all weights count their steps in one tensor."""
    progress = LOAD_ALL(engine, folder, **options)
    for group in engine.optimizer.param_groups:
        group["step"] *= len(group["params"])
    return progress


LOAD_ALL = checkpoint.load_all


WRAP_MODEL = loop.wrap_model
BUILD_ENGINE = loop.build_engine


def overlapping(*args: Any, overlap: bool) -> Any:
    """DDP as on CUDA."""
    return WRAP_MODEL(*args, overlap=True)


@contextlib.contextmanager
def small_buckets() -> Iterator[None]:
    """Several buckets in so small a model."""
    with mock.patch.object(optimizer, "DistributedDataParallelConfig", partial(optimizer.DistributedDataParallelConfig, bucket_size=20_000)):
        yield


@contextlib.contextmanager
def overlapping_small_buckets() -> Iterator[None]:
    """As a run without graphs on CUDA."""
    with small_buckets(), mock.patch.object(loop, "wrap_model", overlapping):
        yield


@contextlib.contextmanager
def one_by_one_small_buckets() -> Iterator[None]:
    """As a run with graphs on CUDA, whose buckets are to be those of one without."""
    with small_buckets(), mock.patch.object(loop, "build_engine", one_by_one):
        yield


def one_by_one(*args: Any) -> step.Engine:
    """An engine that takes gradients as one with CUDA graphs does; on a CPU its passes stay eager."""
    return replace(BUILD_ENGINE(*args), graphs=MicroBatchGraphs(torch.device("cpu")))


@contextlib.contextmanager
def ungathered() -> Iterator[None]:
    """Checkpoints of weights as they lie, between an update and the forward pass that gathers them."""
    with mock.patch.object(loop, "wrap_model", overlapping), mock.patch.object(checkpoint, "gather_weights", lambda engine: None):
        yield


@contextlib.contextmanager
def planted_means() -> Iterator[None]:
    """The mean of micro-batches' means, and nobody looks at what the loss promises of its gradients (that alone would stop the run)."""

    def unpromised(*args: Any, unit_gradient: bool, **kwargs: Any) -> torch.Tensor:
        return linear_cross_entropy(*args, **kwargs)

    with mock.patch.object(step, "masked_loss", mean_of_means), mock.patch.object(model, "linear_cross_entropy", unpromised):
        yield


def over_padded_rows_too(*args: Any, real_rows: int, **kwargs: Any) -> torch.Tensor:
    """The loss with a softmax over every row of the LM head."""
    return linear_cross_entropy(*args, **kwargs)


def second_slice_early(lengths: Sequence[int], cp: int, rank: int) -> list[Chunk]:
    """Each document's second slice of a rank begins, and ends, one token early."""
    right = chunks(lengths, cp, rank)
    return [replace(chunk, start=chunk.start - place % 2, stop=chunk.stop - place % 2) for place, chunk in enumerate(right)]


class LeftAsGathered:
    """Stands for `context_parallel.Reordered`: the ranks' tokens stay as they came, end to end."""

    @staticmethod
    def apply(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        return x


@contextlib.contextmanager
def planted(fault: str | None) -> Iterator[None]:
    """One defect, by name."""
    patches = {
        None: contextlib.nullcontext(),
        # the gradients of norm weights, each rank seeing its part of the sequence, are no longer summed over tensor-parallel ranks
        "no_sequence_parallel_reduction": mock.patch(
            "megatron.core.distributed.finalize_model_grads._allreduce_non_tensor_model_parallel_grads", lambda *args, **kwargs: None
        ),
        # the two ends of the pipeline update their copies of a tied embedding from their own gradients alone
        "no_embedding_reduction": mock.patch(
            "megatron.core.distributed.finalize_model_grads._allreduce_word_embedding_grads", lambda *args, **kwargs: None
        ),
        "shared_adam_step": mock.patch.object(checkpoint, "load_all", load_with_one_step_tensor),
        "mean_of_micro_batch_means": planted_means(),
        # not faults: micro-batches without megatron-core's schedule; weights gathered while the next forward pass runs, as on CUDA
        "one_by_one": mock.patch.object(loop, "build_engine", one_by_one),
        "overlap": mock.patch.object(loop, "wrap_model", overlapping),
        "overlap_saved_ungathered": ungathered(),
        "overlap_small_buckets": overlapping_small_buckets(),
        "one_by_one_small_buckets": one_by_one_small_buckets(),
        "zigzag_shifted_by_one": mock.patch.object(data, "chunks", second_slice_early),
        "zigzag_not_undone": mock.patch.object(context_parallel, "Reordered", LeftAsGathered),
        "padded_rows_in_softmax": mock.patch.object(model, "linear_cross_entropy", over_padded_rows_too),
    }
    with patches[fault]:
        yield


def main() -> None:
    """Run every case in turn; groups are rebuilt for each."""
    plan = json.loads(Path(sys.argv[1]).read_text())
    for case in plan["cases"].values():
        with planted(case.get("fault")):
            loop.train(load_recipe(None, [*plan["common"], *case["set"]], TrainConfig))
    parallel.stop()


if __name__ == "__main__":
    main()
