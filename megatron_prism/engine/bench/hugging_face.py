"""transformers' own model and a plain training step, with and without Liger's kernels: what most people train with.

AutoModelForCausalLM in the case's precision (bf16 weights, as people train with it; FP8 has no counterpart), SDPA attention, no gradient
checkpointing, torch's AdamW (fused on CUDA), gradients clipped, the tokens of the case on the device already. Over data-parallel ranks: torch's DDP.
"""

import contextlib
import importlib
import sys
from typing import Any

import torch
from torch import Tensor

from megatron_prism.engine.bench.bare import pool
from megatron_prism.engine.bench.cases import Case
from megatron_prism.engine.bench.clock import Timeline
from megatron_prism.engine.parallel import Mesh


class TransformersLoop:
    """transformers and torch, on a case."""

    def __init__(self, case: Case, mesh: Mesh, device: torch.device) -> None:
        self.timeline, self.notes, self.clip = Timeline(device), list[str](), case.train.optimizer.clip_grad
        self.num_microbatches, self.taken = mesh.plan.num_microbatches, 0
        self.tokens = [batch.tokens for batch in pool(case, mesh, device)]
        if case.train.fp8 is not None:
            self.notes.append("bf16: transformers has no FP8 training")
        self.plain = self.make(case, device)
        self.model: Any = self.plain
        if mesh.plan.dp > 1:
            on = [device.index] if device.type == "cuda" else None
            self.model = torch.nn.parallel.DistributedDataParallel(self.plain, device_ids=on, gradient_as_bucket_view=True)
        adamw = case.train.optimizer
        options = {"lr": adamw.lr, "betas": adamw.betas, "eps": adamw.eps, "weight_decay": adamw.weight_decay}
        self.optimizer = torch.optim.AdamW(self.plain.parameters(), fused=device.type == "cuda", **options)
        self.last: Tensor | None = None

    def make(self, case: Case, device: torch.device) -> Any:
        """The model with random weights on the device."""
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(case.hf_config, trust_remote_code=False)
        dtype = torch.bfloat16 if case.train.precision == "bf16" else torch.float32
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        return model.to(device).train()

    def step(self) -> None:
        """One step, which waits for nothing on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        total: Any = 0.0
        for number in range(self.num_microbatches):
            tokens = self.tokens[self.taken % len(self.tokens)]
            self.taken += 1
            last = number == self.num_microbatches - 1
            with contextlib.nullcontext() if last or self.model is self.plain else self.model.no_sync():
                with self.timeline.span("forward"):
                    loss = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss / self.num_microbatches
                with self.timeline.span("backward"):
                    loss.backward()
            total = total + loss.detach()
        with self.timeline.span("optimizer"):
            if self.clip is not None:
                torch.nn.utils.clip_grad_norm_(self.plain.parameters(), self.clip)
            self.optimizer.step()
        self.last = total

    def loss(self) -> float:
        """Of this rank's last step."""
        assert self.last is not None
        return float(self.last)

    def parameters(self) -> int:
        """Each tied one once."""
        return sum(weight.numel() for weight in self.plain.parameters())

    def close(self) -> None:
        """Free the model."""
        for tensor in [*self.plain.parameters(), *(value for state in self.optimizer.state.values() for value in state.values())]:
            tensor.grad = None
            tensor.untyped_storage().resize_(0)


class LigerLoop(TransformersLoop):
    """The same with Liger's kernels in place of transformers' functions, those of this model's family that Liger switches on by itself."""

    def make(self, case: Case, device: torch.device) -> Any:
        """Liger also replaces functions of transformers' modules, for every model of the process: they are put back by `close`."""
        model = super().make(case, device)
        self.replaced = [(owner, dict(vars(owner))) for owner in (sys.modules[type(model).__module__], torch.nn.functional)]
        liger: Any = importlib.import_module("liger_kernel.transformers.monkey_patch")
        liger.MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type](model=model)
        return model

    def close(self) -> None:
        """Free the model, and put transformers' functions back."""
        super().close()
        for owner, before in self.replaced:
            for name, value in before.items():
                if getattr(owner, name) is not value:
                    setattr(owner, name, value)


def liger_models() -> set[str]:
    """The model types that Liger knows; none where it is not installed or does not go with this transformers."""
    try:
        liger: Any = importlib.import_module("liger_kernel.transformers.monkey_patch")
    except ImportError:
        return set()
    return set(liger.MODEL_TYPE_TO_APPLY_LIGER_FN)
