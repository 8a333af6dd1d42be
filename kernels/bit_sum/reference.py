"""The definition of `bit_sum`, in plain torch."""

from collections.abc import Sequence

import torch
from torch import Tensor

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""bytes -> the integer of that size"""


def total(flat: Sequence[Tensor]) -> Tensor:
    """`bit_sum` of integers."""
    return torch.stack([numbers.sum(dtype=torch.int64) for numbers in flat]).sum()
