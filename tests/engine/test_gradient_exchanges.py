"""When gradients are exchanged: while the backward pass runs, or after all passes; the buckets are the same. What sums come out: tests/laws."""

from functools import partial
from pathlib import Path

import pytest
import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from tiny_models import write_tiny

from megatron_prism import families
from megatron_prism.config import OptimizerConfig, ParallelConfig
from megatron_prism.engine import device, optimizer, parallel
from megatron_prism.engine.model import BuildOptions, build
from megatron_prism.planning.layout import make_plan

pytestmark = pytest.mark.usefixtures("leave_groups")


@pytest.mark.parametrize("overlap", [True, False])
def test_exchanges_begin_inside_the_backward_pass_where_they_overlap_and_nowhere_else(tmp_path: Path, monkeypatch, overlap):
    """A graph of a pass (CUDA) may hold none: a run with graphs asks for overlap=False."""
    _, model = families.load(write_tiny("llama", tmp_path / "hf"))
    place = device.setup("cpu")
    parallel.start(place)
    mesh = parallel.build_mesh(make_plan(model, ParallelConfig(), 1, 8, global_batch=1, micro_batch=1), seed=1)
    monkeypatch.setattr(optimizer, "DistributedDataParallelConfig", partial(optimizer.DistributedDataParallelConfig, bucket_size=2_000))
    (chunk,) = optimizer.wrap_model(build(model, mesh, BuildOptions("fp32"), place), mesh, OptimizerConfig(), overlap=overlap)
    groups = chunk.bucket_groups
    begun: list[int] = []
    start = _ParamAndGradBucketGroup.start_grad_sync

    def counted(group, **options):
        begun.append(groups.index(group))
        return start(group, **options)

    monkeypatch.setattr(_ParamAndGradBucketGroup, "start_grad_sync", counted)
    tokens = torch.arange(8).unsqueeze(0)
    for _ in range(2):  # in its first step megatron-core only counts the gradients of a bucket
        chunk.zero_grad_buffer()
        begun.clear()
        chunk(tokens, tokens, None, labels=tokens).sum().backward()
        inside = sorted(begun)
        chunk.finish_grad_sync()
        assert sorted(begun) == list(range(len(groups))), "each once, in the pass or after it"
    assert len(groups) > 3, "several buckets, whether exchanges overlap or not"
    assert inside == (list(range(len(groups))) if overlap else [])
