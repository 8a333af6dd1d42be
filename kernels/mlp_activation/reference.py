"""The definition of `swiglu` and `squared_relu`, in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_prism.kernels.choice import compute_dtype


def swiglu(x: Tensor) -> Tensor:
    """`swiglu`."""
    gate, up = x.to(compute_dtype(x)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def squared_relu(x: Tensor) -> Tensor:
    """`squared_relu`."""
    return torch.relu(x.to(compute_dtype(x))).square().to(x.dtype)
