"""transformers' own model and a plain training step, with and without Liger's kernels: what most people train with.

AutoModelForCausalLM, torch's scaled_dot_product_attention with whichever of its kernels is fastest for the shape, no gradient checkpointing, not
compiled, torch's AdamW (fused on CUDA), gradients clipped, the tokens of the case on the device already. Two conventions, each a baseline of its own:
bf16 throughout, weights and moments too, without fp32 masters, the fewest bytes; and fp32 weights, gradients and moments under autocast, as `Trainer`
with bf16=True trains an fp32 model. FP8 has no counterpart. Over data-parallel ranks: torch's DDP.
"""

import contextlib
import importlib
import importlib.metadata
import statistics
import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_prism.engine.bench.bare import pool
from megatron_prism.engine.bench.cases import Case
from megatron_prism.engine.bench.clock import Timeline, mark, milliseconds, synchronize
from megatron_prism.engine.parallel import Mesh
from megatron_prism.errors import UserError

ATTENTION = {"FlashAttention": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
"""torch's kernels for long sequences on CUDA"""
ATTENTION_CALLS = 5


class TransformersLoop:
    """transformers and torch, on a case, all in the case's precision."""

    autocast = False
    convention = "weights, gradients and moments in bf16, no fp32 masters: an update moves 14 bytes a weight"

    def __init__(self, case: Case, mesh: Mesh, device: torch.device) -> None:
        self.timeline, self.notes, self.clip = Timeline(device), list[str](), case.train.optimizer.clip_grad
        self.num_microbatches, self.taken, self.device = mesh.plan.num_microbatches, 0, device
        self.tokens = [batch.tokens for batch in pool(case, mesh, device)]
        if case.train.precision == "bf16":
            self.notes.append(self.convention)
        if case.train.fp8 is not None:
            self.notes.append("bf16: transformers has no FP8 training")
        self.attention = self.choose_attention(case)
        self.plain = self.make(case, device)
        self.model: Any = self.plain
        if mesh.plan.dp > 1:
            on = [device.index] if device.type == "cuda" else None
            self.model = torch.nn.parallel.DistributedDataParallel(self.plain, device_ids=on, gradient_as_bucket_view=True)
        adamw = case.train.optimizer
        options = {"lr": adamw.lr, "betas": adamw.betas, "eps": adamw.eps, "weight_decay": adamw.weight_decay}
        self.optimizer = torch.optim.AdamW(self.plain.parameters(), fused=device.type == "cuda", **options)
        self.last: Tensor | None = None

    def choose_attention(self, case: Case) -> list[SDPBackend]:
        """torch's kernels for attention, the fastest first; none on a CPU, where it has one."""
        if self.device.type != "cuda":
            return []
        times = {name: attention_ms(case, kernel, self.device) for name, kernel in ATTENTION.items()}
        order = sorted((name for name, time in times.items() if time is not None), key=lambda name: times[name] or 0.0)
        self.notes.append("attention, forward and backward of one layer: " + ", ".join(f"{name} {times[name]:.2f} ms" for name in order))
        return [*(ATTENTION[name] for name in order), SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

    def make(self, case: Case, device: torch.device) -> Any:
        """The model with random weights on the device."""
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(case.hf_config, trust_remote_code=False)
        dtype = torch.bfloat16 if case.train.precision == "bf16" and not self.autocast else torch.float32
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        return model.to(device).train()

    def step(self) -> None:
        """One step, which waits for nothing on the device."""
        with sdpa_kernel(self.attention, set_priority=True) if self.attention else contextlib.nullcontext():
            self._step()

    def _step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        total: Any = 0.0
        for number in range(self.num_microbatches):
            tokens = self.tokens[self.taken % len(self.tokens)]
            self.taken += 1
            last = number == self.num_microbatches - 1
            with contextlib.nullcontext() if last or self.model is self.plain else self.model.no_sync():
                with self.timeline.span("forward"), torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
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


class AutocastLoop(TransformersLoop):
    """fp32 weights, gradients and moments; products in bf16 by torch's autocast."""

    autocast = True
    convention = (
        "fp32 weights, gradients and moments under bf16 autocast, as Trainer with bf16=True on an fp32 model: an update moves 28 bytes a weight"
    )


class LigerLoop(TransformersLoop):
    """The same with Liger's kernels in place of transformers' functions, those of this model's family that Liger switches on by itself."""

    def make(self, case: Case, device: torch.device) -> Any:
        """The model with Liger's kernels. What Liger replaces for every model of the process, in modules, is in place during this side's steps alone.

        Errors: UserError where Liger has replaced nothing.
        """
        model = super().make(case, device)
        owners = [sys.modules[type(model).__module__], torch.nn.functional]
        before = [dict(vars(owner)) for owner in owners]
        liger: Any = importlib.import_module("liger_kernel.transformers.monkey_patch")
        liger.MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type](model=model)
        self.replaced = [
            (owner, name, value, getattr(owner, name))
            for owner, names in zip(owners, before, strict=True)
            for name, value in names.items()
            if getattr(owner, name) is not value
        ]
        self._put(original=True)
        found = liger_modules(model)
        if not found:
            raise UserError(f"liger-kernel {importlib.metadata.version('liger-kernel')} has replaced nothing in {type(model).__name__}")
        self.notes.append(
            f"Liger {importlib.metadata.version('liger-kernel')} in place: {', '.join(found + [name for _, name, *_ in self.replaced])}"
        )
        return model

    def step(self) -> None:
        """One step, with Liger's functions in transformers' modules."""
        self._put(original=False)
        try:
            super().step()
        finally:
            self._put(original=True)

    def _put(self, original: bool) -> None:
        for owner, name, theirs, ligers in self.replaced:
            setattr(owner, name, theirs if original else ligers)


class LigerAutocastLoop(LigerLoop, AutocastLoop):
    """Liger's kernels, fp32 weights and moments, products in bf16 by autocast."""


def liger_modules(model: Any) -> list[str]:
    """Forward passes of a model's modules that are Liger's, each with how often it is there."""
    forwards = (getattr(module.forward, "__func__", module.forward) for module in model.modules())
    names = Counter(forward.__qualname__.removesuffix(".forward") for forward in forwards if forward.__module__.startswith("liger_kernel"))
    return [f"{count} {name}" for name, count in names.items()]


def liger_models() -> set[str]:
    """The model types that Liger knows; none where it is not installed or does not go with this transformers."""
    try:
        liger: Any = importlib.import_module("liger_kernel.transformers.monkey_patch")
    except ImportError:
        return set()
    return set(liger.MODEL_TYPE_TO_APPLY_LIGER_FN)


def attention_ms(case: Case, kernel: SDPBackend, device: torch.device) -> float | None:
    """What forward and backward of one layer's attention core take by one of torch's kernels, median; None where it cannot."""
    model, times = case.model, []
    shape = (case.plan.micro_batch, case.train.data.seq_len)
    heads = (model.num_attention_heads, model.num_query_groups, model.num_query_groups)
    with torch.enable_grad():
        try:
            for _ in range(ATTENTION_CALLS):
                q, k, v = (torch.randn(*shape, count, model.kv_channels, device=device, dtype=torch.bfloat16, requires_grad=True) for count in heads)
                begin = mark(device)
                with sdpa_kernel(kernel):
                    out = torch.nn.functional.scaled_dot_product_attention(
                        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=len(set(heads)) > 1
                    )
                out.backward(out.detach())
                end = mark(device)
                synchronize(device)
                times.append(milliseconds(begin, end))
        except RuntimeError:  # torch's word for a shape that a kernel does not take
            return None
    return statistics.median(times)
