"""The definition of `ssd_scan` in plain torch: matrices inside chunks, a scan over chunks. Differentiable; memory is linear in length x chunk.

Inside a chunk, y_i = sum_j (C_i . B_j) exp(s_i - s_j) step_j x_j over j <= i of the same document, s being the running sum of step * a; what came
before the chunk enters through the state at its start.
Legend: b batch, c chunks, i and j positions in a chunk, h heads = g groups x r heads of a group, p channels of a head, n state.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_prism.kernels.choice import compute_dtype, document_runs


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
    """`ssd_scan` -> (y in x's type, last state)."""
    length, groups, wide = x_blhp.shape[1], b_blgn.shape[2], compute_dtype(x_blhp)
    chunk = min(chunk_size, length)
    x = x_blhp.to(wide)
    step = time_steps(dt_blh.to(wide), dt_bias_h, time_step_limit)
    # a padded position has step 0: it adds nothing to the state and does not decay it
    xs, decay = (_chunks(t, chunk).unflatten(3, (groups, -1)) for t in (x * step.unsqueeze(-1), step * a_h.to(wide)))
    bs, cs = _chunks(b_blgn.to(wide), chunk), _chunks(c_blgn.to(wide), chunk)
    sums = decay.double().cumsum(2)  # differences of long fp32 sums would lose the last digits
    runs = None if document_bl is None else _run_chunks(document_runs(document_bl), chunk)

    weight = torch.einsum("bcign,bcjgn->bcgij", cs, bs).unsqueeze(3) * _decay_inside(sums, runs, wide)
    y = torch.einsum("bcgrij,bcjgrp->bcigrp", weight, xs)
    start, last = _states(xs, bs, sums, runs, initial_state_bhpn)
    y = y + torch.einsum("bcign,bcgrpn->bcigrp", cs, start) * _decay_from_start(sums, runs, wide).unsqueeze(-1)
    y_blhp = y.flatten(1, 2).flatten(2, 3)[:, :length]
    if d_h is not None:
        y_blhp = y_blhp + x * d_h.to(wide).unsqueeze(-1)
    return y_blhp.to(x_blhp.dtype), last.flatten(1, 2) if return_state else None


def time_steps(dt_blh: Tensor, dt_bias_h: Tensor | None, limit: tuple[float, float]) -> Tensor:
    """Raw dt -> the step of the recurrence."""
    raw = dt_blh if dt_bias_h is None else dt_blh + dt_bias_h.to(dt_blh.dtype)
    return F.softplus(raw).clamp(*limit)


def _chunks(x: Tensor, chunk: int) -> Tensor:
    """[b, l, ...] -> [b, c, chunk, ...], the end padded with zeros."""
    missing = -x.shape[1] % chunk
    return F.pad(x, (*(0, 0) * (x.dim() - 2), 0, missing)).unflatten(1, (-1, chunk))


def _run_chunks(runs_bl: Tensor, chunk: int) -> Tensor:
    """Document numbers [b, l] -> [b, c, chunk]; padding belongs to the last document, whose state the end of the scan is."""
    missing = -runs_bl.shape[1] % chunk
    return torch.cat([runs_bl, runs_bl[:, -1:].expand(-1, missing)], dim=1).unflatten(1, (-1, chunk))


def _decay_inside(sums_bcigr: Tensor, runs_bci: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[b, c, g, r, i, j]: what is left at i of what entered at j; 0 for later positions and other documents."""
    sums = sums_bcigr.permute(0, 1, 3, 4, 2)
    between = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).to(dtype)
    size = sums.shape[-1]
    seen = torch.ones(size, size, dtype=torch.bool, device=sums.device).tril()
    if runs_bci is not None:
        seen = (seen & (runs_bci.unsqueeze(-1) == runs_bci.unsqueeze(-2)))[:, :, None, None]
    return between.masked_fill(~seen, -torch.inf).exp()


def _carried(runs_bci: Tensor) -> Tensor:
    """[b, c]: the document of the state at each chunk's start, that of the position before; the first chunk's is its own first."""
    return torch.cat([runs_bci[:, :1, 0], runs_bci[:, :-1, -1]], dim=1)


def _decay_from_start(sums_bcigr: Tensor, runs_bci: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[b, c, i, g, r]: what is left at i of the state at the chunk's start."""
    left = sums_bcigr.to(dtype).exp()
    if runs_bci is None:
        return left
    return left * (runs_bci == _carried(runs_bci).unsqueeze(-1))[..., None, None]


def _states(
    xs_bcjgrp: Tensor, bs_bcjgn: Tensor, sums_bcjgr: Tensor, runs_bcj: Tensor | None, initial_state_bhpn: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The state at each chunk's start [b, c, g, r, p, n], and the last one."""
    left = (sums_bcjgr[:, :, -1:] - sums_bcjgr).to(xs_bcjgrp.dtype).exp()
    if runs_bcj is not None:
        left = left * (runs_bcj == runs_bcj[:, :, -1:])[..., None, None]
    added = torch.einsum("bcjgrp,bcjgn->bcgrpn", xs_bcjgrp * left.unsqueeze(-1), bs_bcjgn)
    kept = _decay_from_start(sums_bcjgr, runs_bcj, xs_bcjgrp.dtype)[:, :, -1, :, :, None, None]
    state = torch.zeros_like(added[:, 0]) if initial_state_bhpn is None else initial_state_bhpn.to(added.dtype).unflatten(1, added.shape[2:4])
    starts = []
    for chunk in range(added.shape[1]):
        starts.append(state)
        state = kept[:, chunk] * state + added[:, chunk]
    return torch.stack(starts, dim=1), state
