"""What the GPU tests share."""

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from megatron_prism.kernels.ssd_scan import fused


@pytest.fixture(scope="module", autouse=True)
def one_configuration() -> Iterator[None]:
    """Hold each of mamba-ssm's Triton kernels to the smallest of its configurations: trying them all takes minutes."""
    if not torch.cuda.is_available() or importlib.util.find_spec("mamba_ssm") is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        for kernel in fused.tuned_kernels(fused.modules()):
            patch.setattr(kernel, "configs", [fused.smallest(kernel.configs)])
        yield
