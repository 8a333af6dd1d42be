"""Which baselines there are, and what each cannot do. Refuses, by name and before any work, a baseline that is asked for and cannot run."""

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from megatron_prism.engine.bench.bare import BareLoop
from megatron_prism.engine.bench.cases import Case
from megatron_prism.engine.bench.hugging_face import AutocastLoop, LigerAutocastLoop, LigerLoop, TransformersLoop, liger_models
from megatron_prism.engine.bench.sides import Ours, Side
from megatron_prism.engine.device import has_transformer_engine
from megatron_prism.engine.parallel import Mesh
from megatron_prism.errors import UserError


def _eager(case: Case, mesh: Mesh, device: torch.device) -> Side:
    """Ours, its kernels started one by one."""
    return Ours(replace(case, train=case.train.model_copy(update={"cuda_graphs": False})), mesh, device)


BASELINES: dict[str, Callable[[Case, Mesh, torch.device], Side]] = {
    "bare_megatron_core": BareLoop,
    "transformers": TransformersLoop,
    "transformers_autocast": AutocastLoop,
    "transformers_liger": LigerLoop,
    "transformers_liger_autocast": LigerAutocastLoop,
    "without_cuda_graphs": _eager,
}


def choose(case: Case, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """The baselines of a case, and of those that are wanted only where available the reason that one is not.

    Errors: UserError for a baseline that is asked for by name and cannot run.
    """
    wanted = case.options.baselines
    obstacles = {name: obstacle(name, case, device) for name in (BASELINES if wanted == "available" else wanted)}
    missing = {name: reason for name, reason in obstacles.items() if reason is not None}
    if missing and wanted != "available":
        reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        raise UserError(f"case {case.name}: {reasons}. Leave it out, or set baselines=available")
    return [name for name in obstacles if name not in missing], missing


def obstacle(name: str, case: Case, device: torch.device) -> str | None:
    """Why a baseline cannot run a case here; None if it can."""
    if name == "bare_megatron_core":
        return _bare_obstacle(case, device)
    if name == "without_cuda_graphs":
        return None if case.train.cuda_graphs else "the case has none: set train.cuda_graphs=true"
    plan = case.plan
    if plan.tp * plan.pp * plan.cp > 1:
        return f"it runs on data-parallel ranks alone, the case has {plan.describe()}"
    if name.endswith("_autocast") and case.train.precision != "bf16":
        return f"it multiplies in bf16, the case has train.precision={case.train.precision}"
    if "liger" not in name:
        return None
    if device.type != "cuda":
        return "Liger's kernels need CUDA"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (pip install liger-kernel)"
    model_type: Any = json.loads((case.hf_config / "config.json").read_text(encoding="utf-8"))["model_type"]
    return None if model_type in liger_models() else f"the installed liger-kernel has no kernels for {model_type}"


def _bare_obstacle(case: Case, device: torch.device) -> str | None:
    if case.plan.pp > 1:
        return "the bare loop has no pipeline"
    if device.type == "cuda" and not has_transformer_engine():
        return "TransformerEngine is not installed, and megatron-core's other layers would be no fair measure"
    if device.type == "cpu" and case.train.optimizer.split_master:
        return "megatron-core's split master weights need TransformerEngine's AdamW"
    if device.type == "cpu" and (case.plan.sp or case.plan.cp > 1):
        return "megatron-core's own layers know neither sequence nor context parallelism on a CPU"
    if case.model.is_hybrid and (device.type != "cuda" or importlib.util.find_spec("mamba_ssm") is None):
        return "megatron-core's own hybrid model needs CUDA and mamba-ssm"
    return None


def forget_fp8() -> None:
    """Drop the scales and histories that TransformerEngine keeps for the whole process, of models that are gone."""
    for name in ("transformer_engine.pytorch.quantization", "transformer_engine.pytorch.fp8"):  # where it is from 2.12 on, and before
        manager: Any = getattr(sys.modules.get(name), "FP8GlobalStateManager", None)
        if manager is not None:
            manager.reset()
