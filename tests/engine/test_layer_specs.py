"""The hybrid stack: what it adds to megatron-core's."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.ssm.mamba_block import MambaStack
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_prism.engine import device
from megatron_prism.engine.layer_specs import HybridStack


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
