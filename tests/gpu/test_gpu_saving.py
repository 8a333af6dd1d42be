"""Host memory that cannot be pinned: copies take longer, and nothing else of CUDA remembers it."""

import pytest
import torch

from megatron_prism.engine import saving

pytestmark = pytest.mark.gpu


def test_memory_that_cannot_be_pinned_leaves_no_error_to_the_next_kernel(caplog: pytest.LogCaptureFixture) -> None:
    room = torch.empty(1 << 20, dtype=torch.uint8)
    assert saving._pin(room)
    assert not saving._pin(room), "it is pinned already, which CUDA calls an error"
    assert [record.message for record in caplog.records if "cannot be pinned (CUDA error" in record.message] != []
    assert torch.arange(8, device="cuda").sum().item() == 28
    torch.cuda.cudart().cudaHostUnregister(room.data_ptr())
