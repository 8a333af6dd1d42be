"""FlashAttention-4 as the core of megatron-core's attention, beside TransformerEngine's other layers.

Owns: when it runs in place of TransformerEngine's choice (cuDNN): asked for by name, or where it was measured to be faster (Hopper), in the version
that was proved, and can do the case; that all ranks take the same; and saying which. Legend as in `attention`.
"""

from typing import Any, Literal

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_prism.engine.attention import CausalAttention
from megatron_prism.engine.documents import lengths_of, segment_ends
from megatron_prism.errors import UserError
from megatron_prism.kernels.causal_attention import causal_attention, fused

AttentionBackend = Literal["auto", "flash", "fused"]
MEASURED = 9
"""major compute capability of the GPUs on which it was measured to be faster than cuDNN (docs/benchmarks.md)"""


class FlashAttention(CausalAttention):
    """The same on another kernel, for one context-parallel rank and without dropout."""

    def forward(
        self, q_sbqd: Tensor, k_tbkd: Tensor, v_tbkd: Tensor, attention_mask: None, packed_seq_params: PackedSeqParams | None = None, **unused: Any
    ) -> Tensor:
        """As CausalAttention's."""
        assert attention_mask is None and self.cp == 1 and self.dropout == 0.0
        packed = packed_seq_params is not None
        if packed:
            q_sbqd, k_tbkd, v_tbkd = (x.unsqueeze(1) for x in (q_sbqd, k_tbkd, v_tbkd))
        out_sbqd = causal_attention(
            q_sbqd,
            k_tbkd,
            v_tbkd,
            scale=self.scale,
            window=self.window,
            ends=None if packed_seq_params is None else segment_ends(packed_seq_params),
            longest=None if packed_seq_params is None else max(lengths_of(packed_seq_params)),
            deterministic=self.config.deterministic_mode,
            impl="fused" if q_sbqd.is_cuda else "auto",  # on a GPU it was chosen because it can run: the reference's memory would be no help
        )
        return out_sbqd.squeeze(1).flatten(1) if packed else out_sbqd.flatten(2)


def obstacle(
    backend: AttentionBackend, head_dim: int, cp: int, bf16: bool, deterministic: bool, transformer_engine: bool, device: torch.device
) -> str | None:
    """Why layers do not take it; None if they do. Errors: UserError when it was asked for by name and cannot run."""
    if backend == "fused":
        return "attention_backend=fused"
    found = _cannot(head_dim, cp, bf16, transformer_engine, device)
    if backend == "flash" and found is not None:
        raise UserError(f"attention_backend=flash cannot run here: {found}; use attention_backend=auto")
    return found if backend == "flash" else found or _unproved(deterministic, device)


def agreed(found: list[str | None]) -> None:
    """found: of every rank, its `obstacle`. Errors: UserError where some ranks would take it and others not: what is trained would hang on places."""
    without = next((rank for rank, why in enumerate(found) if why is not None), None)
    if without is not None and None in found:
        raise UserError(
            f"attention_backend=auto: rank {found.index(None)} would take FlashAttention-4, and rank {without} not: {found[without]}; "
            "install the same on all machines, or set attention_backend=fused"
        )


def describe(why: str | None) -> str:
    """Which core runs, in one line; why: `obstacle`'s."""
    return f"attention: FlashAttention-4 {fused.installed()}" if why is None else f"attention: cuDNN, not FlashAttention-4: {why}"


def _cannot(head_dim: int, cp: int, bf16: bool, transformer_engine: bool, device: torch.device) -> str | None:
    if not transformer_engine:
        return "the layers are not TransformerEngine's (layers=transformer_engine, on CUDA)"
    if cp > 1:
        return f"parallel.cp={cp}, and TransformerEngine's attention alone exchanges keys and values"
    if not bf16:
        return "precision=fp32, and its kernels compute in 16 bits"
    return fused.library_obstacle(device, head_dim)


def _unproved(deterministic: bool, device: torch.device) -> str | None:
    """What `auto` does not take it for, and `flash` does."""
    if fused.installed() != fused.VERSION:
        return f"version {fused.installed()}, and {fused.VERSION} was proved (attention_backend=flash takes it)"
    if deterministic:
        return "deterministic=true, in which nobody measured which is faster (attention_backend=flash takes it)"
    found = torch.cuda.get_device_capability(device)[0]
    return None if found == MEASURED else f"on compute capability {found} nobody measured which is faster (attention_backend=flash takes it)"
