"""The scan of Mamba-2 (state space duality; Dao & Gu 2024, arXiv 2405.21060): one public function, `ssd_scan`.

`reference.py` is the definition; `fused.py` hands the work to mamba-ssm's Triton kernels.
Legend: b batch, l length, h heads, p channels of a head, g groups of heads, n state.
"""

import math

from torch import Tensor

from megatron_prism.kernels.choice import Impl, use_fused
from megatron_prism.kernels.ssd_scan import fused, reference

__all__ = ["ssd_scan"]


def ssd_scan(
    x_blhp: Tensor,
    dt_blh: Tensor,
    a_h: Tensor,
    b_blgn: Tensor,
    c_blgn: Tensor,
    *,
    chunk_size: int,
    d_h: Tensor | None = None,
    dt_bias_h: Tensor | None = None,
    time_step_limit: tuple[float, float] = (0.0, math.inf),
    initial_state_bhpn: Tensor | None = None,
    document_bl: Tensor | None = None,
    return_state: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """y = C h + D x along the recurrence h = exp(step * a) h + step * x B^T, with step = clamp(softplus(dt + dt_bias), *time_step_limit).

    a_h is negative; head i uses group i // (h / g). chunk_size: a tile, which does not change the result. document_bl: integers; the state starts
    from zero wherever they change, and an initial state belongs to the first document. Any length from 1.
    Computed in fp32 (fp64 for fp64 inputs) -> y [b, l, h, p] in x's type; with return_state also the last state [b, h, p, n], in the type of the
    computation. Errors: UserError when impl="fused" cannot do the case.
    """
    assert x_blhp.shape[2] % b_blgn.shape[2] == 0 and b_blgn.shape == c_blgn.shape
    obstacle = None if impl == "reference" else fused.obstacle(x_blhp, initial_state_bhpn, document_bl)
    run = fused.scan if use_fused(impl, "ssd_scan", x_blhp, obstacle) else reference.scan
    y_blhp, state_bhpn = run(
        x_blhp, dt_blh, a_h, b_blgn, c_blgn, chunk_size, d_h, dt_bias_h, time_step_limit, initial_state_bhpn, document_bl, return_state
    )
    if not return_state:
        return y_blhp
    assert state_bhpn is not None
    return y_blhp, state_bhpn
