"""What is installed, which GPUs there are, what the operating system allows. Each function is one check: `Asked` -> findings."""

import importlib.util
import os
import platform
import re
import resource
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from megatron_prism.doctor import Asked, Finding
from megatron_prism.errors import UserError

SHOWN = ("torch", "megatron-core", "transformers")
"""Packages with a line of their own; the others have one together."""
DRIVER = Path("/proc/driver/nvidia/version")
SHARED_MEMORY = Path("/dev/shm")
GIB = 2**30
APEX_PARTS = {"amp_C": "multi-tensor functions", "fused_weight_gradient_mlp_cuda": "weight gradients", "fused_layer_norm_cuda": "norms"}


def software(asked: Asked) -> list[Finding]:
    """Python and every package that megatron-prism requires, against the ranges it was declared with."""
    found = [Finding("green", "python", f"{platform.python_version()} at {sys.executable}")]
    try:
        needed = [Requirement(text) for text in metadata.requires("megatron-prism") or []]
    except metadata.PackageNotFoundError:
        fix = "python -m pip install -e ."
        return [*found, Finding("yellow", "megatron-prism", "runs from a clone that is not installed: its requirements are not known here", fix)]
    plain = [need for need in needed if need.marker is None or need.marker.evaluate({"extra": ""})]
    lines = [_package(need) for need in plain]
    shown = [line for line in lines if line.name in SHOWN or line.state != "green"]
    rest = len(lines) - len(shown)
    return [*found, *shown, Finding("green", "other packages", f"{rest} of {len(lines)} requirements, all in their ranges")]


def _package(need: Requirement) -> Finding:
    fix = f"python -m pip install '{need.name}{need.specifier}'"
    try:
        version = metadata.version(need.name)
    except metadata.PackageNotFoundError:
        return Finding("red", need.name, f"is not installed; {need.specifier} is needed", fix)
    if not need.specifier.contains(version, prereleases=True):
        return Finding("red", need.name, f"{version} is outside of {need.specifier}", fix)
    return Finding("green", need.name, f"{version} (range {need.specifier})")


def gpu(asked: Asked) -> list[Finding]:
    """Driver, CUDA, GPUs and NCCL, as torch sees them."""
    import torch

    driver = _driver()
    if not torch.cuda.is_available():
        return [_without_gpu(asked, driver, torch.version.cuda)]
    devices = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    shown = ", ".join(f"{device.name} ({device.total_memory / GIB:.0f} GiB)" for device in devices)
    found = [Finding("green", "gpu", f"{shown}; CUDA {torch.version.cuda}, driver {driver or 'unknown'}")]
    if not torch.distributed.is_nccl_available():
        return [*found, Finding("red", "nccl", "this torch has none: ranks on GPUs cannot talk", "python -m pip install --force-reinstall torch")]
    return [*found, Finding("green", "nccl", ".".join(map(str, torch.cuda.nccl.version())))]


def _without_gpu(asked: Asked, driver: str | None, cuda: str | None) -> Finding:
    if driver and not cuda:
        state, detail, fix = (
            "yellow",
            f"driver {driver} is there, but this torch was built without CUDA",
            "python -m pip install --force-reinstall torch",
        )
    elif driver:
        state, detail, fix = "yellow", f"driver {driver} is there, CUDA {cuda} of torch finds no device", "nvidia-smi  # and see CUDA_VISIBLE_DEVICES"
    else:
        state, detail, fix = "green", "none: the engine runs on the CPU, with gloo", ""
    wanted = asked.device == "cuda"
    return Finding("red" if wanted else state, "gpu", detail, fix or ("use --device cpu, or a machine with a GPU" if wanted else ""))  # type: ignore[arg-type]


def _driver() -> str | None:
    found = re.search(r"Kernel Module\D*([\d.]+)", DRIVER.read_text()) if DRIVER.is_file() else None
    return found[1] if found else None


def gpu_packages(asked: Asked) -> list[Finding]:
    """TransformerEngine, the Mamba kernels, FlashAttention-4, Apex: used on GPUs where they are installed."""
    with_gpu = DRIVER.is_file() and asked.device != "cpu"
    roles = {
        "transformer-engine": "FP8 and fused layers; without it our layers and torch's attention run",
        "mamba-ssm": "kernels of hybrid models; without it our own run",
        "causal-conv1d": "convolution of hybrid models; without it our own runs",
        "flash-attn-4": "attention on Hopper; without it cuDNN's, slower",
    }
    return [*(_optional(name, role, with_gpu) for name, role in roles.items()), _apex()]


def _optional(name: str, role: str, with_gpu: bool) -> Finding:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        fix = 'python -m pip install --no-build-isolation -c constraints/gpu.txt -e ".[gpu,flash]"'
        return Finding("yellow" if with_gpu else "green", name, f"not installed ({role})", fix if with_gpu else "")
    needs = [Requirement(text) for text in (metadata.requires("megatron-prism") or [])] if _is_installed() else []
    wanted = next((need for need in needs if need.name == name), None)
    if wanted is not None and not wanted.specifier.contains(version, prereleases=True):
        return Finding(
            "yellow", name, f"{version} is outside of {wanted.specifier}", f"python -m pip install --no-build-isolation '{name}{wanted.specifier}'"
        )
    return Finding("green", name, version)


def _is_installed() -> bool:
    try:
        return bool(metadata.version("megatron-prism"))
    except metadata.PackageNotFoundError:
        return False


def _apex() -> Finding:
    parts = [f"{role} ({module})" for module, role in APEX_PARTS.items() if importlib.util.find_spec(module) is not None]
    if parts:
        return Finding("green", "apex", f"fused parts that megatron-core can take: {', '.join(parts)}")
    if importlib.util.find_spec("apex") is not None:
        return Finding("yellow", "apex", "holds none of NVIDIA's fused parts: PyPI's package of that name is another project", "pip uninstall apex")
    return Finding("green", "apex", "not installed, and not needed: our optimizer's step and TransformerEngine do its work")


def vllm(asked: Asked) -> list[Finding]:
    """The Python of vLLM's own environment, found as a recipe finds it."""
    from megatron_prism.generate.vllm_server import PYTHON, find_python

    if not os.environ.get(PYTHON):
        return [Finding("green", "vllm", f"none named by ${PYTHON} (or a recipe's generation.python); transformers generates in process")]
    try:
        return [Finding("green", "vllm", f"in the environment of {find_python(None)}, named by ${PYTHON}")]
    except UserError as error:
        return [Finding("red", "vllm", str(error), f"unset {PYTHON}  # or name the right Python: docs/generate.md")]


def patches(asked: Asked) -> list[Finding]:
    """Every change to torch and megatron-core that a run makes on this device. Each is applied for real."""
    from megatron_prism.engine import device

    if device.choose(asked.device).type == "cuda":  # type: ignore[arg-type]
        return [Finding("green", "patches", "none on CUDA")]
    device.setup("cpu")
    applied = device.active_patches()
    return [
        Finding("green", "patch", f"{patch.what}: {patch.why}")
        if patch.what in applied
        else Finding("red", "patch", f"{patch.what} was not applied: {patch.why}", "python -m pip install 'megatron-core>=0.16.1,<0.20'")
        for patch in device.CPU_PATCHES
    ]


def limits(asked: Asked) -> list[Finding]:
    """Open files, shared memory, processes' memory, space."""
    return [_open_files(), *_shared_memory(), _space(Path(asked.path))]


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fix = f"ulimit -n {min(65536, hard) if hard != resource.RLIM_INFINITY else 65536}"
    state = "red" if soft < 256 else "yellow" if soft < 1024 else "green"
    return Finding(state, "open files", f"{soft} at once (ulimit -n; at most {hard})", "" if state == "green" else fix)  # type: ignore[arg-type]


def _shared_memory() -> Iterator[Finding]:
    if not SHARED_MEMORY.is_dir():
        yield Finding("yellow", "shared memory", f"no {SHARED_MEMORY}: NCCL cannot use it between GPUs of a machine", "mount -t tmpfs tmpfs /dev/shm")
        return
    size = shutil.disk_usage(SHARED_MEMORY).total / GIB
    fix = "docker run --shm-size=16g ...  # or mount -o remount,size=16G /dev/shm"
    yield Finding("yellow" if size < 1 else "green", "shared memory", f"{size:.2f} GiB in {SHARED_MEMORY}", fix if size < 1 else "")


def _space(path: Path) -> Finding:
    try:
        free = shutil.disk_usage(path).free / GIB
    except OSError as error:
        return Finding("red", "free space", f"{path}: {error.strerror}", f"mkdir -p {path}  # or give another --path")
    state = "red" if free < 1 else "yellow" if free < 20 else "green"
    fix = f"df -h {path}  # remove what is not needed, or give another --path; prism plan RECIPE says what a run writes"
    return Finding(state, "free space", f"{free:.1f} GiB in {path}", "" if state == "green" else fix)  # type: ignore[arg-type]
