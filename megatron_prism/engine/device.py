"""CPU or CUDA: the one place that knows, and the compatibility layer that lets megatron-core run on CPU tensors and gloo.

Owns: choosing the device, the process group's backend, and every patch of megatron-core (`PATCHES`, printed by `prism doctor`).
Nothing is patched by an import: a stage's entry point calls `setup`. The layer follows the device that was asked for, not whether CUDA exists,
so that the CPU suite also runs on a GPU machine. Each patch redirects one "this is CUDA" assumption, or mends one fault, named with the place
in megatron-core 0.16.1; all hold through 0.19 unless they say otherwise.
"""

import contextlib
import functools
import importlib.util
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from megatron_prism.errors import UserError

DeviceName = Literal["auto", "cpu", "cuda"]
CPU = torch.device("cpu")
_applied: list[str] = []


@dataclass(frozen=True)
class Patch:
    """One change to torch or megatron-core: what it replaces, why, and the function that does it."""

    what: str
    why: str
    apply: Callable[[], None]


def setup(name: DeviceName) -> torch.device:
    """Choose the device, apply the patches that it needs, and bind this process to it. Call before anything of megatron-core is built.

    Errors: UserError when CUDA is asked for and there is none.
    """
    device = choose(name)
    if device.type == "cpu":
        _apply(CPU_PATCHES)
    else:
        torch.cuda.set_device(device)
        # fp32 means fp32: TF32 keeps 10 bits of each factor, and layouts would differ by 5e-5 instead of 1e-6
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
    return device


def choose(name: DeviceName) -> torch.device:
    """`auto` is this rank's CUDA device where there is one, else the CPU."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return CPU
    if not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no CUDA device here; use device=cpu, or install a CUDA build of torch")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def backend(device: torch.device) -> str:
    """The torch.distributed backend of a device."""
    return "nccl" if device.type == "cuda" else "gloo"


def has_transformer_engine() -> bool:
    """Whether TransformerEngine's layers can be used."""
    return importlib.util.find_spec("transformer_engine") is not None


def fp8_obstacle(recipe: str) -> str | None:
    """Why this machine cannot multiply in FP8 by a recipe (delayed, tensorwise or blockwise); None if it can."""
    if not has_transformer_engine():
        return "TransformerEngine is not installed (pip install megatron-prism[gpu])"
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    manager: Any = FP8GlobalStateManager
    able, reason = manager.is_fp8_block_scaling_available() if recipe == "blockwise" else manager.is_fp8_available()
    return None if able else str(reason)


def make_deterministic() -> None:
    """From here on only kernels whose sums have a fixed order; torch raises where it has none. Call after `setup`, before anything is built.

    TransformerEngine and mamba-ssm look at the environment and at torch's switch, our convolution at torch's (kernels/causal_conv1d/fused.py); our
    other kernels sum in a fixed order.
    """
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["MAMBA_DETERMINISTIC"] = "1"
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a guard against faults, at the cost of a pass over every new tensor


def active_patches() -> list[str]:
    """What has been patched in this process, in order."""
    return list(_applied)


def _apply(patches: tuple[Patch, ...]) -> None:
    for patch in patches:
        if patch.what not in _applied:
            patch.apply()
            _applied.append(patch.what)


# --- the CPU layer -----------------------------------------------------------------------------------------------------------------------------


class _NullStream:
    """Stands for a CUDA stream where everything runs in order anyway."""

    device = CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, *args: Any) -> None: ...
    def wait_event(self, *args: Any) -> None: ...
    def record_event(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...


class _NullEvent:
    """Stands for a CUDA event: a wall-clock time stamp."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.time = time.perf_counter()

    def record(self, *args: Any) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None: ...
    def wait(self, *args: Any) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "_NullEvent") -> float:
        return (other.time - self.time) * 1e3


def _patch_cuda_calls() -> None:
    cuda: Any = torch.cuda
    stream = _NullStream()
    cuda.current_device = lambda: CPU
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.Stream, cuda.Event = _NullStream, _NullEvent


def _patch_rng() -> None:
    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(int(seed))

    def set_rng_state(state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    cuda: Any = torch.cuda
    for module in (cuda, cuda.random):
        module.manual_seed = manual_seed
        module.get_rng_state = lambda device=None: torch.get_rng_state()
        module.set_rng_state = set_rng_state
    from megatron.core.tensor_parallel import random as mcore_random

    mcore_random._set_cuda_rng_state = set_rng_state
    expected = "CPU RNG state changed within GPU RNG context"
    logging.getLogger(mcore_random.__name__).addFilter(lambda record: expected not in record.getMessage())


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _on_cpu(make: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return make(*args, **kwargs)

    return wrapper


def _patch_factories() -> None:
    # `with torch.device("meta")` knows factories by identity, from a list that it makes at first use: were that list made of our wrappers,
    # transformers would fill rotary frequencies with uninitialised memory
    torch.utils._device._device_constructors()
    names = "tensor zeros ones empty full arange rand randn randint empty_like zeros_like ones_like full_like"
    for name in names.split():
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    stay: Any = lambda self, *args, **kwargs: self  # noqa: E731
    torch.Tensor.cuda = stay
    torch.nn.Module.cuda = stay


def _patch_jit_fuser() -> None:
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    import megatron.core.jit as mcore_jit

    mcore_jit.disable_jit_fuser()


@contextlib.contextmanager
def _cuda_type_names() -> Iterator[None]:
    original = torch.Tensor.type

    def spelled(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return original(self, dtype, *args, **kwargs)
        return str(original(self)).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = spelled
    try:
        yield
    finally:
        torch.Tensor.type = original


def _spell_types_inside(owner: Any, name: str) -> Callable[..., Any]:
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with _cuda_type_names():
            return inner(*args, **kwargs)

    setattr(owner, name, wrapper)
    return wrapper


def _patch_type_names() -> None:
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer

    clip = _spell_types_inside(clip_grads, "clip_grad_by_total_norm_fp32")
    optimizer.clip_grad_by_total_norm_fp32 = clip
    _spell_types_inside(optimizer.Float16OptimizerWithFloat16Params, "__init__")
    _spell_types_inside(distrib_optimizer.DistributedOptimizer, "__init__")


def _patch_optimizer_kernels() -> None:
    import megatron.core.optimizer as package
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
    from megatron.core.utils import local_multi_tensor_applier, local_multi_tensor_l2_norm, local_multi_tensor_scale

    package.Adam, package.SGD, package.USING_PYTORCH_OPTIMIZER = torch.optim.AdamW, torch.optim.SGD, True
    for flag in ("HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER", "USING_APEX_OPTIMIZER"):
        setattr(distrib_optimizer, flag, False)
    for module in (clip_grads, optimizer):
        module.multi_tensor_applier, module.multi_tensor_scale_impl = local_multi_tensor_applier, local_multi_tensor_scale
    clip_grads.l2_norm_impl = local_multi_tensor_l2_norm


CPU_PATCHES = (
    Patch(
        "torch.cuda.{current_device, set_device, synchronize, empty_cache, stream, Stream, Event, ...}",
        "used as `device=` in about 70 places (tensor_parallel/layers.py, p2p_communication.py:190-321) and by DDP's overlap: the CPU, no-ops",
        _patch_cuda_calls,
    ),
    Patch(
        "torch.cuda RNG functions, tensor_parallel.random._set_cuda_rng_state",
        "megatron-core's RNG tracker forks the CUDA generator (random.py:55, 99, 235, 422): the CPU's default generator",
        _patch_rng,
    ),
    Patch(
        "torch.{tensor, zeros, ones, empty, full, arange, rand*, *_like}, Tensor.cuda, Module.cuda",
        'device="cuda" and pin_memory are literal in schedules.py:596, clip_grads.py:90, optimizer.py:473, utils.py:1207: redirected',
        _patch_factories,
    ),
    Patch(
        "megatron.core.optimizer's Adam and multi-tensor functions",
        "CUDA kernels where TransformerEngine or Apex is installed (optimizer/__init__.py:13, clip_grads.py:14, optimizer.py:16): torch's own",
        _patch_optimizer_kernels,
    ),
    Patch("megatron.core.jit fuser, TORCHDYNAMO_DISABLE=1", "a choice, not a need: no inductor compilation on the CPU", _patch_jit_fuser),
    Patch(
        "Tensor.type() inside the optimizer constructors and clip_grad_by_total_norm_fp32",
        'compared with "torch.cuda.FloatTensor" (optimizer.py:671, 690; distrib_optimizer.py:361, 420; clip_grads.py:167)',
        _patch_type_names,
    ),
)
