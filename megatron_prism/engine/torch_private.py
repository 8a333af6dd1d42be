"""What the engine takes of torch that begins with an underscore, without a promise that the next version has it: one place that says so if not.

Owns: the words for a torch that lacks a name. Refuses: that torch, at once where checkpoints are written or read with the name.
"""

from importlib import import_module
from typing import Any

import torch

from megatron_prism.errors import UserError


def find(module: str, *names: str) -> tuple[Any, ...]:
    """What the names stand for in a module of torch. Errors: UserError with torch's version and what it lacks."""
    try:
        found = import_module(module)
    except ImportError:
        raise _lacking(module) from None
    for name in names:
        if not hasattr(found, name):
            raise _lacking(f"{module}.{name}")
    return tuple(getattr(found, name) for name in names)


def _lacking(name: str) -> UserError:
    return UserError(
        f"torch {torch.__version__} has no {name}, which this version of megatron-prism uses; install the torch of constraints/cpu.txt or gpu.txt, "
        "or a megatron-prism made for that torch"
    )


StorageInfo, StoragePrefix = find("torch.distributed.checkpoint.filesystem", "_StorageInfo", "_StoragePrefix")
"""where an item lies in a checkpoint's files, as `.metadata` keeps it; and what a rank's files begin with"""
