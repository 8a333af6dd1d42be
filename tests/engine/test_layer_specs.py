"""The hybrid stack: what it adds to megatron-core's."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.ssm.mamba_block import MambaStack
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from tiny_models import write_tiny

from megatron_prism import families
from megatron_prism.config import ParallelConfig
from megatron_prism.engine import device, parallel
from megatron_prism.engine.layer_specs import HybridStack
from megatron_prism.engine.model import BuildOptions, build
from megatron_prism.planning.layout import make_plan


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_dropout_differs_between_ranks_where_they_hold_other_tokens(monkeypatch, sequence_parallel):
    """Ranks that hold the same tokens must draw the same mask; one mask for all parts of a sequence would drop the same places of each."""
    device.setup("cpu")
    monkeypatch.setattr(MambaStack, "forward", lambda self: torch.rand(8))
    stack = HybridStack.__new__(HybridStack)
    torch.nn.Module.__init__(stack)
    stack.config = SimpleNamespace(sequence_parallel=sequence_parallel)
    drawn = []
    for tp_rank in range(2):
        model_parallel_cuda_manual_seed(3, tp_rank=tp_rank, ep_rank=0, etp_rank=0)
        drawn.append(stack())
    assert torch.equal(*drawn) != sequence_parallel


def test_recomputed_layers_give_the_same_gradients_and_keep_less(tmp_path):
    write_tiny("granite_hybrid", tmp_path)
    _, model = families.load(tmp_path)
    place = device.setup("cpu")
    parallel.start(place)
    mesh = parallel.build_mesh(make_plan(model, ParallelConfig(), 1, 32, global_batch=1, micro_batch=1), seed=1)
    ids = torch.arange(32).unsqueeze(0)
    gradients, kept = {}, {}
    for recompute in (None, "selective", "full"):
        (chunk,) = build(model, mesh, BuildOptions(layers="local", recompute=recompute), place)
        torch.nn.utils.vector_to_parameters(torch.linspace(-1, 1, sum(w.numel() for w in chunk.parameters())).sin(), chunk.parameters())
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            loss = chunk(ids, ids, None, labels=ids.roll(-1)).mean()
        loss.backward()
        gradients[recompute], kept[recompute] = torch.cat([w.grad.flatten() for w in chunk.parameters()]), sum(sizes)
    parallel.stop()
    assert torch.equal(gradients["full"], gradients[None]) and torch.equal(gradients["selective"], gradients[None])
    assert kept["full"] < 0.5 * kept[None]
