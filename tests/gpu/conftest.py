"""What the GPU tests share."""

import importlib
import importlib.util
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_configuration() -> Iterator[None]:
    """Hold each of mamba-ssm's Triton kernels to the smallest of its configurations: trying them all takes minutes."""
    if not torch.cuda.is_available() or importlib.util.find_spec("mamba_ssm") is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ssd_bmm", "ssd_chunk_scan", "ssd_chunk_state", "ssd_state_passing", "ssd_combined"):
            for kernel in vars(importlib.import_module(f"mamba_ssm.ops.triton.{name}")).values():
                if isinstance(getattr(kernel, "configs", None), list) and kernel.configs:
                    patch.setattr(kernel, "configs", [min(kernel.configs, key=tile_size)])
        yield


def tile_size(config: Any) -> int:
    return math.prod(size for name, size in config.kwargs.items() if name.startswith("BLOCK_SIZE"))
