"""Tensor parallelism's exchanges beside its matrix products: TransformerEngine's userbuffers.

With sequence parallelism each product of a layer waits for a gather, or is followed by a scatter, of tokens. Cut into parts, the one runs while the
other is on its way. Owns: the buffers, made once in a process, before the first forward pass. Where NVLink multicast must not be used, the
environment variable UB_SKIPMC=1 keeps TransformerEngine from it.
"""

from typing import Any

import torch

from megatron_prism.engine.device import has_transformer_engine
from megatron_prism.engine.parallel import Mesh
from megatron_prism.errors import UserError

_shape: tuple[int, int, int, bool] | None = None
"""tokens, hidden size, tp and FP8 of the buffers that exist"""


def start(mesh: Mesh, place: torch.device, seq_len: int, hidden_size: int, fp8: bool, bf16_layers: bool) -> None:
    """Make the buffers for micro-batches of this shape; a collective of all ranks. bf16_layers: some layers multiply in bf16 beside FP8 ones.

    Errors: UserError without CUDA and TransformerEngine, and where buffers of another shape exist: TransformerEngine keeps one set in a process.
    """
    global _shape
    if place.type != "cuda" or not has_transformer_engine():
        raise UserError(f"parallel.tp_comm_overlap=true is TransformerEngine's, on CUDA; this run is on {place.type}; set it to false")
    from transformer_engine.pytorch.module import base

    engine: Any = base
    shape = (seq_len * mesh.plan.micro_batch // mesh.plan.cp, hidden_size, mesh.plan.tp, fp8)
    if _shape == shape:
        return
    if _shape is not None:
        raise UserError(f"parallel.tp_comm_overlap: buffers for {_shape} exist in this process, {shape} are asked for; start another process")
    modes = engine.UserBufferQuantizationMode
    wanted = ([modes.FP8] if fp8 else []) + ([modes.NONE] if bf16_layers or not fp8 else [])
    engine.initialize_ub(shape=list(shape[:2]), tp_size=mesh.plan.tp, quantization_modes=wanted, bootstrap_backend="nccl")
    _shape = shape
