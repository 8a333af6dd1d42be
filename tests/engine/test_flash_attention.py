"""The attention module around FlashAttention-4 is the one around torch's SDPA, on the CPU with the kernel's reference; and when it is taken."""

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch

from megatron_prism.engine.attention import CausalAttention
from megatron_prism.engine.documents import documents
from megatron_prism.engine.flash_attention import FlashAttention, agreed, describe, obstacle
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


def why(backend: str = "auto", **changed: object) -> str | None:
    given = {"cp": 1, "bf16": True, "deterministic": False, "transformer_engine": True, "device": CPU} | changed
    return obstacle(backend, 128, **given)


def test_it_is_not_taken_where_it_is_not_asked_for_or_layers_are_ours():
    assert why("fused") == "attention_backend=fused"
    assert str(why(transformer_engine=False)).startswith("the layers are not TransformerEngine's")
    assert describe(why(cp=2)) == (
        "attention: cuDNN, not FlashAttention-4: parallel.cp=2, and TransformerEngine's attention alone exchanges keys and values"
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"cp": 2}, "parallel.cp=2"), ({"bf16": False}, "precision=fp32"), ({"transformer_engine": False}, "the layers are not TransformerEngine's")],
)
def test_asked_for_by_name_it_is_refused_where_it_cannot_run(changed, said):
    with pytest.raises(UserError, match=f"attention_backend=flash cannot run here: {said}.*; use attention_backend=auto"):
        why("flash", **changed)


@pytest.mark.skipif(fused.installed() is not None, reason="flash-attn-4 is installed here")
def test_without_the_library_the_extra_is_named():
    with pytest.raises(UserError, match=r"flash-attn-4 is not installed \(pip install megatron-prism\[flash\]\)"):
        why("flash")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A machine that has what it takes, as far as the rule looks."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(fused, "installed", lambda: fused.VERSION)
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    fused.missing.cache_clear()
    yield monkeypatch
    fused.missing.cache_clear()


def test_auto_takes_what_was_proved_and_a_name_the_rest(hopper: pytest.MonkeyPatch):
    assert why() is why("flash") is None and describe(None) == f"attention: FlashAttention-4 {fused.VERSION}"
    assert "deterministic=true" in str(why(deterministic=True)) and why("flash", deterministic=True) is None
    hopper.setattr(fused, "installed", lambda: "4.0.0b99")
    assert str(why()).startswith(f"version 4.0.0b99, and {fused.VERSION} was proved") and why("flash") is None
    hopper.setattr(fused, "installed", lambda: fused.VERSION)
    hopper.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert "compute capability 10" in str(why()) and why("flash") is None


def test_what_is_installed_and_cannot_be_imported_is_not_taken(hopper: pytest.MonkeyPatch):
    hopper.setitem(sys.modules, "flash_attn.cute", None)  # what Python takes for a module that is not there
    assert str(why()).startswith(f"flash-attn-4 {fused.VERSION} cannot be imported (ModuleNotFoundError: ")


def test_ranks_that_would_take_different_cores_are_told_so():
    agreed([None, None])
    agreed(["one reason", "another"])
    with pytest.raises(UserError, match="rank 0 would take FlashAttention-4, and rank 2 not: not installed; install the same on all machines"):
        agreed([None, None, "not installed"])
