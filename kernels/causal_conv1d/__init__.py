"""The short convolution of Mamba-2: one public function, `causal_conv1d`.

`reference.py` is the definition; `fused.py` hands the work to the library causal-conv1d.
Legend: b batch, l length, d channels, k taps.
"""

from typing import Literal

from torch import Tensor

from megatron_prism.kernels.causal_conv1d import fused, reference
from megatron_prism.kernels.choice import Impl, use_fused

__all__ = ["causal_conv1d"]


def causal_conv1d(
    x_bld: Tensor,
    weight_dk: Tensor,
    bias_d: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    document_bl: Tensor | None = None,
    initial_state_bdk: Tensor | None = None,
    return_state: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """activation(bias + sum_i weight[:, i] * x[l - (k - 1) + i]), each channel alone.

    Inputs before the first are those of the initial state [b, d, k - 1] (oldest first), zero without one. document_bl: integers; taps do not cross
    a place where they change, and an initial state belongs to the first document.
    Computed in fp32 (fp64 for fp64 inputs) -> y [b, l, d] in x's type; with return_state also the last k - 1 inputs [b, d, k - 1] (zeros for
    those of earlier documents).
    Errors: UserError when impl="fused" cannot do the case.
    """
    obstacle = None if impl == "reference" else fused.obstacle(x_bld, weight_dk, initial_state_bdk, document_bl)
    run = fused.convolve if use_fused(impl, "causal_conv1d", x_bld, obstacle) else reference.convolve
    y_bld = run(x_bld, weight_dk, bias_d, activation, document_bl, initial_state_bdk)
    return (y_bld, reference.last_inputs(x_bld, weight_dk.shape[1], document_bl, initial_state_bdk)) if return_state else y_bld
