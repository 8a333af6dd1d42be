"""A torch that lacks a name which checkpoints need is refused by its version and that name."""

import importlib
import re

import pytest
import torch
from torch.distributed.checkpoint import filesystem

from megatron_prism.engine import torch_private
from megatron_prism.errors import UserError


@pytest.mark.parametrize("name", ["_StorageInfo", "_StoragePrefix"])
def test_a_name_that_torch_no_longer_has_is_named_with_torchs_version(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delattr(filesystem, name)
    words = rf"torch {re.escape(torch.__version__)} has no torch\.distributed\.checkpoint\.filesystem\.{name}, .*constraints/"
    with pytest.raises(UserError, match=words):
        importlib.reload(torch_private)


def test_a_module_that_torch_no_longer_has_is_named_too() -> None:
    with pytest.raises(UserError, match=r"has no torch\.distributed\.gone, "):
        torch_private.find("torch.distributed.gone", "_anything")
