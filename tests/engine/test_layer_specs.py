"""The hybrid stack: what it adds to megatron-core's; the activation as a module."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.ssm.mamba_block import MambaStack
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from tiny_models import write_tiny

from megatron_prism import families
from megatron_prism.config import ParallelConfig
from megatron_prism.engine import device, model, parallel
from megatron_prism.engine.layer_specs import Activation, HybridStack
from megatron_prism.engine.model import BuildOptions, build, transformer_config
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
    _, shape = families.load(tmp_path)
    place = device.setup("cpu")
    parallel.start(place)
    mesh = parallel.build_mesh(make_plan(shape, ParallelConfig(), 1, 32, global_batch=1, micro_batch=1), seed=1)
    ids = torch.arange(32).unsqueeze(0)
    gradients, kept = {}, {}
    for recompute in (None, "selective", "full"):
        (chunk,) = build(shape, mesh, BuildOptions(layers="local", recompute=recompute), place)
        torch.nn.utils.vector_to_parameters(torch.linspace(-1, 1, sum(w.numel() for w in chunk.parameters())).sin(), chunk.parameters())
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            loss = chunk(ids, ids, None, labels=ids.roll(-1)).mean()
        loss.backward()
        gradients[recompute], kept[recompute] = torch.cat([w.grad.flatten() for w in chunk.parameters()]), sum(sizes)
    parallel.stop()
    assert torch.equal(gradients["full"], gradients[None]) and torch.equal(gradients["selective"], gradients[None])
    assert kept["full"] < 0.5 * kept[None]


@pytest.mark.parametrize(("name", "changes"), [("llama", {"attention_bias": True, "mlp_bias": True}), ("granite_hybrid", {}), ("nemotron_h", {})])
def test_the_activation_as_a_module_computes_what_megatron_core_does_and_adds_no_state(tmp_path, monkeypatch, name, changes):
    """SwiGLU with and without a bias before it, and squared ReLU; dense and hybrid."""
    write_tiny(name, tmp_path, **changes)
    _, shape = families.load(tmp_path)
    assert shape.add_bias_linear == bool(changes)
    place = device.setup("cpu")
    parallel.start(place)
    mesh = parallel.build_mesh(make_plan(shape, ParallelConfig(), 1, 32, global_batch=1, micro_batch=1), seed=1)
    ids = torch.arange(32).unsqueeze(0)
    found = []
    for as_module in (False, True):
        with monkeypatch.context() as patch:
            if as_module:
                patch.setattr(model, "transformer_config", with_module)
            (chunk,) = build(shape, mesh, BuildOptions(layers="local"), place)
        torch.nn.utils.vector_to_parameters(torch.linspace(-1, 1, sum(w.numel() for w in chunk.parameters())).sin(), chunk.parameters())
        assert any(isinstance(module, Activation) for module in chunk.modules()) == as_module
        loss = chunk(ids, ids, None, labels=ids.roll(-1)).mean()
        loss.backward()
        found.append((loss.item(), torch.cat([w.grad.flatten() for w in chunk.parameters()]), list(chunk.sharded_state_dict())))
    parallel.stop()
    (loss, gradients, state), (loss_of_module, gradients_of_module, state_of_module) = found
    assert loss_of_module == pytest.approx(loss, rel=1e-6) and state_of_module == state
    assert (gradients_of_module - gradients).norm() < 1e-5 * gradients.norm()


def with_module(*given):
    """transformer_config's answer on the CPU, and the setting that it makes for TransformerEngine on CUDA."""
    config = transformer_config(*given)
    assert not config.use_te_activation_func
    config.use_te_activation_func = True
    return config


@pytest.mark.parametrize("name", ["llama", "nemotron_h"])
def test_the_activation_is_ours_in_transformer_engines_layers_on_cuda_alone(tmp_path, monkeypatch, name):
    """megatron-core asks for TransformerEngine's rotary kernel, which stands in here for the library."""
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", object())
    write_tiny(name, tmp_path)
    _, shape = families.load(tmp_path)
    parallel.start(device.setup("cpu"))
    mesh = parallel.build_mesh(make_plan(shape, ParallelConfig(), 1, 32, global_batch=1, micro_batch=1), seed=1)
    found = {}
    for layers in ("local", "transformer_engine"):
        for place in ("cpu", "cuda"):
            config = transformer_config(shape, mesh, BuildOptions(layers=layers), torch.device(place))
            found[layers, place] = config.use_te_activation_func, config.bias_activation_fusion
    parallel.stop()
    assert found == {
        ("local", "cpu"): (False, False),
        ("local", "cuda"): (False, shape.is_gated),
        ("transformer_engine", "cpu"): (False, False),
        ("transformer_engine", "cuda"): (True, False),
    }
