"""`ssd_scan` on mamba-ssm's Triton kernels (mamba_chunk_scan_combined of 2.3.2.post1).

Owns: what those kernels cannot do (`obstacle`), the types and layouts that they expect, and which of their tiles run where sums must have a fixed
order. fp32 inputs are multiplied in TF32 there.
"""

import functools
import importlib.util
import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_prism.kernels.choice import document_runs

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def obstacle(x_blhp: Tensor, initial_state_bhpn: Tensor | None, document_bl: Tensor | None) -> str | None:
    """Why mamba-ssm cannot do this case; None if it can."""
    if not x_blhp.is_cuda:
        return "the tensors are not on CUDA"
    if importlib.util.find_spec("mamba_ssm") is None:
        return "mamba-ssm is not installed (pip install megatron-prism[gpu])"
    if x_blhp.dtype not in TYPES:
        return f"mamba-ssm does not compute in {x_blhp.dtype}"
    if initial_state_bhpn is not None and document_bl is not None:
        return "mamba-ssm's gradient of an initial state does not know documents"
    return None


def scan(
    x_blhp: Tensor,
    dt_blh: Tensor,
    a_h: Tensor,
    b_blgn: Tensor,
    c_blgn: Tensor,
    chunk_size: int,
    d_h: Tensor | None,
    dt_bias_h: Tensor | None,
    time_step_limit: tuple[float, float],
    initial_state_bhpn: Tensor | None,
    document_bl: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """`ssd_scan` -> (y in x's type, last state in fp32)."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    if torch.are_deterministic_algorithms_enabled():
        hold_tiles()
    out = mamba_chunk_scan_combined(
        x_blhp,
        dt_blh,
        a_h.float(),
        b_blgn.to(x_blhp.dtype),
        c_blgn.to(x_blhp.dtype),
        tile(chunk_size),
        D=None if d_h is None else d_h.float(),
        dt_bias=None if dt_bias_h is None else dt_bias_h.float(),
        dt_softplus=True,
        dt_limit=time_step_limit,
        initial_states=initial_state_bhpn,
        # document numbers from 0: the kernels take the initial state to be of document 0, and compare ids across a whole chunk
        seq_idx=None if document_bl is None else document_runs(document_bl).int().contiguous(),
        return_final_states=return_state,
    )
    return out if return_state else (out, None)


@functools.cache
def hold_tiles() -> None:
    """From here on each kernel runs in its smallest tiles: sums are cut by tiles, and which are fastest may come out otherwise after a restart.

    mamba-ssm's own deterministic mode does so at import, unless TRITON_CACHE_AUTOTUNING=1, and then starts may overwrite each other's choice.
    """
    for kernel in tuned_kernels(modules()):
        kernel.configs = [smallest(kernel.configs)]


def modules() -> list[ModuleType]:
    """mamba-ssm's, with the kernels of the scan."""
    from mamba_ssm.ops.triton import ssd_bmm, ssd_chunk_scan, ssd_chunk_state, ssd_combined, ssd_state_passing

    return [ssd_bmm, ssd_chunk_scan, ssd_chunk_state, ssd_combined, ssd_state_passing]


def tuned_kernels(among: list[ModuleType]) -> list[Any]:
    """Those in modules that come in several configurations, of which Triton takes the one that was fastest when the kernel first ran."""
    values = [value for module in among for value in vars(module).values()]
    return [value for value in values if isinstance(getattr(value, "configs", None), list) and len(value.configs) > 1]


def smallest(configs: list[Any]) -> Any:
    """Of Triton's configurations the first with the fewest numbers in a tile and the fewest stages."""
    return min(
        configs, key=lambda config: math.prod(size for name, size in config.kwargs.items() if name.startswith("BLOCK_SIZE")) * config.num_stages
    )


def tile(chunk_size: int) -> int:
    """The kernels' chunk: a power of two from 16 to 256. It does not change the result."""
    return min(max(1 << (chunk_size - 1).bit_length(), 16), 256)
