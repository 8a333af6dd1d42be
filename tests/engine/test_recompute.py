"""What recomputed layers keep: attention's output, so that its core runs once; on the device or in host memory."""

from collections import deque

import pytest
import torch
from recompute_options import OPTIONS
from tiny_models import write_tiny

from megatron_prism import families
from megatron_prism.config import ParallelConfig
from megatron_prism.engine import device, parallel, recompute
from megatron_prism.engine.attention import CausalAttention
from megatron_prism.engine.documents import documents
from megatron_prism.engine.model import BuildOptions, build
from megatron_prism.planning.layout import make_plan

LENGTH = 32
PACKED = {"packed_seq_params": documents(torch.tensor([0, 12, 32], dtype=torch.int32), (12, 20))}


@pytest.fixture
def counted(monkeypatch):
    """Runs of attention's core with gradients or without."""
    calls = []
    plain = CausalAttention.forward
    monkeypatch.setattr(CausalAttention, "forward", lambda self, *args, **kwargs: calls.append(1) or plain(self, *args, **kwargs))
    return calls


@pytest.mark.parametrize("name", ["llama", "mistral", "granite_hybrid"])
@pytest.mark.parametrize("packed", [{}, PACKED], ids=["whole", "packed"])
def test_gradients_are_equal_whatever_is_kept_and_attention_runs_as_often_as_it_must(tmp_path, monkeypatch, counted, name, packed):
    """Two micro-batches forward before the first backward pass, as in a pipeline."""
    monkeypatch.setattr(recompute, "MIN_BYTES", 1)
    parked = []
    monkeypatch.setattr(recompute.Parked, "get", lambda self, plain=recompute.Parked.get: parked.append(self) or plain(self))
    write_tiny(name, tmp_path)
    _, shape = families.load(tmp_path)
    place = device.setup("cpu")
    parallel.start(place)
    mesh = parallel.build_mesh(make_plan(shape, ParallelConfig(), 1, LENGTH, global_batch=1, micro_batch=1), seed=1)
    ids = torch.arange(LENGTH).unsqueeze(0)
    gradients, runs, fetched = {}, {}, {}
    for case, options in OPTIONS.items():
        (chunk,) = build(shape, mesh, BuildOptions(layers="local", **options), place)
        torch.nn.utils.vector_to_parameters(torch.linspace(-1, 1, sum(w.numel() for w in chunk.parameters())).sin(), chunk.parameters())
        counted.clear()
        parked.clear()
        losses = [chunk(tokens, ids, None, labels=tokens.roll(-1), **packed).mean() for tokens in (ids, ids + 7)]
        for loss in losses:
            loss.backward()
        gradients[case] = torch.cat([w.grad.flatten() for w in chunk.parameters()])
        runs[case], fetched[case] = len(counted), len(parked)
    parallel.stop()
    for case, found in gradients.items():
        assert torch.equal(found, gradients["nothing recomputed"]), case
    once = runs["nothing recomputed"]
    assert runs == {case: 2 * once if options.get("recompute") and not options.get("keep_attention") else once for case, options in OPTIONS.items()}
    assert fetched["recomputed"] == fetched["attention kept"] == 0
    assert fetched["attention kept, offloaded"] > fetched["offloaded"] == 2 * shape.num_layers


def test_an_evaluation_keeps_nothing(tmp_path):
    write_tiny("llama", tmp_path)
    _, shape = families.load(tmp_path)
    place = device.setup("cpu")
    parallel.start(place)
    mesh = parallel.build_mesh(make_plan(shape, ParallelConfig(), 1, LENGTH, global_batch=1, micro_batch=1), seed=1)
    (chunk,) = build(shape, mesh, BuildOptions(layers="local", recompute="full", keep_attention=True), place)
    ids = torch.arange(LENGTH).unsqueeze(0)
    chunk.eval()
    with torch.no_grad():
        chunk(ids, ids, None, labels=ids)
    parallel.stop()
    assert all(not layer.self_attention.core_attention.records for layer in chunk.decoder.layers)


class Frees(torch.nn.Module):
    """A core that saves a tensor for its backward pass, and whose output may lie where that was."""

    def forward(self, query, key, value):
        weights = query.sigmoid()
        total = (weights * key).sum()
        del weights
        return value + total


@pytest.mark.parametrize("size", [1 << 10, 1 << 14, 1 << 16, 1 << 18])
def test_an_offloaded_tensor_is_not_taken_for_the_output_that_has_its_memory(monkeypatch, size):
    monkeypatch.setattr(recompute, "MIN_BYTES", 1)
    core = Frees()
    core.__class__ = recompute._keeping(Frees)
    core.records, core.store = deque(), recompute.Offload()
    inputs = [torch.linspace(-1, 1, size) * factor for factor in (1, 2, 3)]
    with torch.no_grad():
        first = core(*inputs)
    assert torch.equal(core(*(x.requires_grad_() for x in inputs)), first)


@pytest.mark.parametrize(
    "saved", [lambda memory: memory[:2], lambda memory: memory[::2], lambda memory: memory], ids=["shorter", "with gaps", "longer"]
)
def test_an_output_is_not_taken_from_a_saved_tensor_that_only_begins_where_it_does(saved):
    memory = torch.arange(8.0)
    output = memory[:4]
    record = recompute.Record((), recompute.Offload().park)
    record.pack(saved(memory))
    record.keep_output(output)
    assert torch.equal(recompute._unpark(record.output).as_strided(record.shape, (1,)), output)


def test_an_output_that_its_graph_saved_in_another_shape_is_kept_once():
    memory = torch.arange(8.0)
    record = recompute.Record((), recompute.Offload().park)
    held = record.pack(memory.view(2, 4))
    record.keep_output(memory)
    assert record.output is held
