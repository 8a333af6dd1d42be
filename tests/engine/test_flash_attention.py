"""The attention module around FlashAttention-4 is the one around torch's SDPA, on the CPU with the kernel's reference; and when it is taken."""

from types import SimpleNamespace

import pytest
import torch

from megatron_prism.engine.attention import CausalAttention
from megatron_prism.engine.documents import documents
from megatron_prism.engine.flash_attention import FlashAttention, uses_flash
from megatron_prism.errors import UserError
from megatron_prism.kernels.causal_attention import fused

CPU = torch.device("cpu")


def cores(window: int | None, softmax_scale: float | None = None) -> tuple[FlashAttention, CausalAttention]:
    size = None if window is None else (window - 1, 0)
    config = SimpleNamespace(
        context_parallel_size=1, kv_channels=8, attention_dropout=0.0, window_size=size, deterministic_mode=False, fp8=None, fp4=None
    )
    flash = FlashAttention(config, 1, None, "self", softmax_scale=softmax_scale)
    return flash, CausalAttention(config, 1, None, "self", softmax_scale=softmax_scale)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softmax_scale", [None, 0.2])
@pytest.mark.parametrize("lengths", [None, (4, 9, 10)])
def test_it_gives_what_our_other_attention_gives(window, softmax_scale, lengths):
    draw = torch.Generator().manual_seed(0)
    batch = () if lengths else (2,)
    query, key, value = (torch.randn(23, *batch, heads, 8, generator=draw) for heads in (4, 2, 2))
    ends = None if lengths is None else torch.tensor([0, 4, 13, 23], dtype=torch.int32)
    rows = {} if lengths is None else {"packed_seq_params": documents(ends, lengths)}
    flash, sdpa = (core(query, key, value, None, **rows) for core in cores(window, softmax_scale))
    assert flash.shape == sdpa.shape and flash.is_contiguous()
    assert torch.allclose(flash, sdpa, atol=1e-6)


def test_it_is_not_taken_where_it_is_not_asked_for_or_layers_are_ours():
    assert not uses_flash("fused", 128, cp=1, bf16=True, transformer_engine=True, device=CPU)
    assert not uses_flash("auto", 128, cp=1, bf16=True, transformer_engine=False, device=CPU)


def test_what_it_lacks_is_said_once_and_cudnn_taken(caplog):
    with caplog.at_level("INFO"):
        assert not uses_flash("auto", 128, cp=2, bf16=True, transformer_engine=True, device=CPU)
    assert caplog.messages == [
        "attention runs on cuDNN, not on FlashAttention-4: parallel.cp=2, and TransformerEngine's attention alone exchanges keys and values"
    ]


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"cp": 2}, "parallel.cp=2"), ({"bf16": False}, "precision=fp32"), ({"transformer_engine": False}, "the layers are not TransformerEngine's")],
)
def test_asked_for_by_name_it_is_refused_where_it_cannot_run(changed, said):
    given = {"cp": 1, "bf16": True, "transformer_engine": True} | changed
    with pytest.raises(UserError, match=f"attention_backend=flash cannot run here: {said}.*; use attention_backend=auto"):
        uses_flash("flash", 128, **given, device=CPU)


@pytest.mark.skipif(fused.missing() is None, reason="flash-attn-4 is installed here")
def test_without_the_library_the_extra_is_named():
    with pytest.raises(UserError, match=r"flash-attn-4 is not installed \(pip install megatron-prism\[flash\]\)"):
        uses_flash("flash", 128, cp=1, bf16=True, transformer_engine=True, device=CPU)
