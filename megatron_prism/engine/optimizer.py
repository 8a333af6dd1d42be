"""AdamW under megatron-core's distributed optimizer: master weights and moments, cut over the data-parallel ranks.

Weight decay leaves out norms and biases (one-dimensional weights), as Megatron-LM does; the learning rate is set each step from a pure schedule.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_prism.config import OptimizerConfig
from megatron_prism.engine.adamw import AdamW
from megatron_prism.engine.fp8_params import Fp8Weights, make_transposes
from megatron_prism.engine.mcore import gradients_for_norm, optimizer_config
from megatron_prism.engine.memory_check import MemoryCheck
from megatron_prism.engine.model import Chunk, to_precision
from megatron_prism.engine.parallel import Mesh


def wrap_model(chunks: list[Chunk], mesh: Mesh, optimizer: OptimizerConfig, overlap: bool) -> list[DistributedDataParallel]:
    """megatron-core's DDP around each chunk: gradients in one buffer, reduced over data-parallel ranks.

    overlap: reduce gradients while the backward pass still runs, and gather weights while the next forward pass does (CUDA). Buckets are the same
    without: which rank owns what, and in which order sums are taken, does not depend on it.
    """
    config = chunks[0].config
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=optimizer.gradients == "fp32",
        overlap_grad_reduce=True,  # else megatron-core makes one bucket of all, whatever bucket_size says (distributed_data_parallel.py:67)
        overlap_param_gather=overlap,
        check_for_nan_in_grad=False,
        fp8_param_gather=config.fp8_param,
    )
    wrapped = [
        DistributedDataParallel(config, ddp, to_precision(chunk, config), disable_bucketing=index > 0, pg_collection=mesh.groups)
        for index, chunk in enumerate(chunks)
    ]
    ddp.overlap_grad_reduce = overlap  # looked at in every pass, and shared by all chunks and their buckets
    return wrapped


class Optimizer:
    """megatron-core's distributed optimizer (which rank owns which range of which weight, the exchange of gradients and weights) around our AdamW.

    Other than in megatron-core's own step the number of tokens and the norm of the gradients stay on the device; dividing by the one, clipping by the
    other, the update and the rounding to bf16 are one pass over memory (`kernels/adamw`).
    """

    def __init__(self, inner: MegatronOptimizer, config: OptimizerConfig, groups: ProcessGroupCollection) -> None:
        self.groups_of_ranks = groups
        self.num_tokens: Tensor | None = None
        self.chained_optimizers: list[Any] = inner.chained_optimizers
        self.param_groups: list[dict[str, Any]] = inner.param_groups
        self.scale_loss = inner.scale_loss
        self.zero_grad = inner.zero_grad
        self.clip_grad = config.clip_grad
        self.memory: MemoryCheck | None = None
        self.fp8_params = False
        """whether the model keeps its FP8 layers' weights in FP8 alone"""
        for part in self.chained_optimizers:
            _order_by_type(part)
            part.optimizer = AdamW(part.optimizer.param_groups, config, Fp8Weights(part, groups.dp_cp))

    def step(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Update the weights, and gather them unless that overlaps with the next forward pass.

        losses: this rank's, of any shape. Returns the gradients' norm before clipping, fp32 [], and whether the update was made, bool []: it is not,
        and all is as before, where any rank's loss or the norm is NaN or infinite. Both stay on the device, where the update's own kernel looks;
        who reads them calls `uncount` after an update that was not made.
        """
        norm, usable = self.measured(losses)
        self.apply(torch.where(usable, norm, torch.nan))
        return norm, usable

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Of the gradients divided by the tokens, before clipping, fp32 [], on every rank. Comes after a forward and backward pass."""
        return self.measured(None)[0]

    @torch.no_grad()
    def apply(self, norm: Tensor) -> None:
        """Update the weights by the gradients whose `gradient_norm` this is; by a norm that is NaN or infinite nothing is changed."""
        mean = torch.where(norm.isfinite(), self._mean(), torch.nan)
        scale = mean if self.clip_grad is None else mean * (self.clip_grad / (norm + 1e-6)).clamp(max=1.0)
        for part in self.chained_optimizers:
            part.optimizer.gradient_scale = scale
            part.step_with_ready_grads()
        if self.memory is not None:
            self.memory.remember()

    def check_memory(self, device: torch.device) -> None:
        """From the next update on, an update whose weights or states are not what the one before it wrote is not made (`memory_check`)."""
        self.memory = MemoryCheck(self.chained_optimizers, self.groups_of_ranks.dp_cp, device)

    def uncount(self) -> None:
        """Forget that the last step was counted: it changed nothing."""
        for part in self.chained_optimizers:
            part.optimizer.uncount()

    def _mean(self) -> Tensor:
        """What a sum over all tokens counts times in their mean."""
        assert self.num_tokens is not None, "a step comes after a forward and backward pass"
        return 1.0 / self.num_tokens.float().clamp(min=1.0).squeeze()

    def finish_gradients(self, model: list[Any], num_tokens: Tensor, **kwargs: Any) -> None:
        """Sum gradients and tokens over all ranks; megatron-core's schedules call it after the last backward pass.

        megatron-core would divide the gradients by the tokens here: a pass over all of them, and a wait for the device.
        """
        finalize_model_grads(model, None, **kwargs)
        pipeline = self.groups_of_ranks.pp
        dist.broadcast(num_tokens, src=dist.get_process_group_ranks(pipeline)[-1], group=pipeline)  # only the last stage counted
        dist.all_reduce(num_tokens, group=self.groups_of_ranks.dp_cp)
        self.num_tokens = num_tokens

    @torch.no_grad()
    def measured(self, losses: Tensor | None) -> tuple[Tensor, Tensor]:
        """`gradient_norm`, and whether it and all ranks' losses are numbers, bool []: in one exchange; weights that several hold counted once."""
        assert self.num_tokens is not None
        for part in self.chained_optimizers:
            part.prepare_grads()
        seen = torch.zeros(2, dtype=torch.float32, device=self.num_tokens.device)
        for part in self.chained_optimizers:
            gradients = gradients_for_norm(part)
            if gradients:
                seen[0] += torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).square().sum()
        if losses is not None:
            seen[1] = (~losses.isfinite()).sum()
        if self.memory is not None:
            seen[1] += self.memory.look().sum()
        dist.all_reduce(seen, group=self.chained_optimizers[0].get_grad_stats_parallel_group())
        norm = seen[0].sqrt() * self._mean()
        return norm, norm.isfinite() & (seen[1] == 0)

    def take_weights(self) -> None:
        """Start anew from the model's weights as they are now: fresh moments, step 0."""
        for part in self.chained_optimizers:
            part.optimizer.forget()
        self._forget_memory()

    def quantise(self) -> None:
        """Make the model's FP8 weights, where it has some, of their masters; weights are to be gathered after it."""
        for part in self.chained_optimizers:
            part.optimizer.fp8.quantise()
        self._forget_memory()

    def initialize(self) -> None:
        """Make every moment and master weight, so that a checkpoint can fill them."""
        for part in self.chained_optimizers:
            part.optimizer.initialize()
        self._forget_memory()

    def _forget_memory(self) -> None:
        if self.memory is not None:
            self.memory.forget()

    def groups(self) -> dict[str, Any]:
        """What belongs to a group of weights and not to a weight: the step, above all."""
        return {"optimizer": {"param_groups": [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]}}

    def load_groups(self, saved: dict[str, Any]) -> None:
        """Take up the step of saved groups; everything else of a group comes from the recipe, at every step."""
        steps = {int(group["step"]) for group in saved["optimizer"]["param_groups"] if "step" in group}
        assert len(steps) == 1, f"one step for all groups, found {sorted(steps)}"
        for group in self.param_groups:
            group["step"] = min(steps)


def build_optimizer(model: list[DistributedDataParallel], config: OptimizerConfig, mesh: Mesh, bf16: bool) -> Optimizer:
    """The optimizer of wrapped chunks, also tied to them for megatron-core's schedules (gradient scaling and the final reduction)."""
    settings = optimizer_config(
        lr=config.lr,
        min_lr=0.0,
        weight_decay=config.weight_decay,
        clip_grad=config.clip_grad or 0.0,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
    )
    # the weights that are updated are the model's own, and gradients, of any type, are handed over beside them
    settings.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
    optimizer = Optimizer(get_megatron_optimizer(settings, model), config, mesh.groups)
    for chunk in model:
        chunk.config.finalize_model_grads_func = optimizer.finish_gradients
        chunk.config.grad_scale_func = optimizer.scale_loss
    if model[0].ddp_config.overlap_grad_reduce:
        schedule: Any = model[0].config
        several = len(model) > 1
        schedule.no_sync_func = [chunk.no_sync for chunk in model] if several else model[0].no_sync
        if several:
            schedule.grad_sync_func = [chunk.start_grad_sync for chunk in model]
    if model[0].config.fp8_param:
        optimizer.fp8_params = True
        optimizer.quantise()
        gather(model)
    return optimizer


def gather(model: list[DistributedDataParallel]) -> None:
    """Make every rank's copy of the weights that of the ranks which updated them, now."""
    for chunk in model:
        chunk.start_param_sync(force_sync=True)
        make_transposes(chunk.parameters())


def _order_by_type(part: Any) -> None:
    """Make the distributed optimizer find each weight's state in groups that hold both fp32 and bf16 weights.

    megatron-core puts a group's fp32 weights first (distrib_optimizer.py:440), but notes their places in the order of the gradient buffers (:300):
    with both types in one group, a save or a load takes one weight's state for another's.
    """
    for index, (fp32, bf16) in enumerate(zip(part.model_fp32_groups, part.model_float16_groups, strict=True)):
        for order, weight in enumerate([*fp32, *bf16]):
            part.model_param_group_index_map[weight] = (index, order)


def set_learning_rate(optimizer: Optimizer, lr: float, weight_decay: float) -> None:
    """Set rate and decay of every parameter group, times the group's own multipliers (norms and biases: no decay)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
