"""AdamW under megatron-core's distributed optimizer: fp32 master weights and moments, cut over the data-parallel ranks.

Weight decay leaves out norms and biases (one-dimensional weights), as Megatron-LM does; the learning rate is set each step from a pure schedule.
"""

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer

from megatron_prism.config import OptimizerConfig
from megatron_prism.engine.device import has_transformer_engine
from megatron_prism.engine.mcore import optimizer_config
from megatron_prism.engine.model import Chunk, to_precision
from megatron_prism.engine.parallel import Mesh
from megatron_prism.errors import UserError


def wrap_model(chunks: list[Chunk], mesh: Mesh, optimizer: OptimizerConfig, overlap: bool) -> list[DistributedDataParallel]:
    """megatron-core's DDP around each chunk: gradients in one buffer, reduced over data-parallel ranks.

    overlap: reduce gradients while the backward pass still runs, and gather weights while the next forward pass does (CUDA).
    """
    config = chunks[0].config
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=optimizer.gradients == "fp32",
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        check_for_nan_in_grad=False,
        fp8_param_gather=config.fp8_param,
    )
    return [
        DistributedDataParallel(config, ddp, to_precision(chunk, config), disable_bucketing=index > 0, pg_collection=mesh.groups)
        for index, chunk in enumerate(chunks)
    ]


def build_optimizer(model: list[DistributedDataParallel], config: OptimizerConfig, bf16: bool) -> MegatronOptimizer:
    """The optimizer of wrapped chunks, also tied to them for megatron-core's schedules (gradient scaling and the final reduction)."""
    settings = optimizer_config(
        lr=config.lr,
        min_lr=0.0,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_eps=config.eps,
        clip_grad=config.clip_grad or 0.0,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        fp8_recipe=model[0].config.fp8_recipe if model[0].config.fp8_param else None,
        **_state_types(config),
    )
    optimizer = get_megatron_optimizer(settings, model)
    for part in optimizer.chained_optimizers:
        _order_by_type(part)
    for chunk in model:
        chunk.config.finalize_model_grads_func = finalize_model_grads
        chunk.config.grad_scale_func = optimizer.scale_loss
    if model[0].ddp_config.overlap_grad_reduce:
        schedule: Any = model[0].config
        several = len(model) > 1
        schedule.no_sync_func = [chunk.no_sync for chunk in model] if several else model[0].no_sync
        if several:
            schedule.grad_sync_func = [chunk.start_grad_sync for chunk in model]
    return optimizer


def _state_types(config: OptimizerConfig) -> dict[str, Any]:
    """megatron-core's "precision-aware" optimizer: TransformerEngine's Adam reads gradients, and keeps master weights and moments, as asked."""
    if not config.is_precision_aware:
        return {}
    if not has_transformer_engine():
        raise UserError(
            "optimizer.gradients=bf16, moments=bf16 and split_master are TransformerEngine's, which is not installed "
            "(pip install megatron-prism[gpu]); leave them at their defaults"
        )
    moments = torch.bfloat16 if config.moments == "bf16" else torch.float32
    return {
        "use_precision_aware_optimizer": True,
        "main_grads_dtype": torch.bfloat16 if config.gradients == "bf16" else torch.float32,
        "exp_avg_dtype": moments,
        "exp_avg_sq_dtype": moments,
        "store_param_remainders": config.split_master,
    }


def _order_by_type(part: Any) -> None:
    """Make the distributed optimizer find each weight's state in groups that hold both fp32 and bf16 weights.

    megatron-core puts a group's fp32 weights first (distrib_optimizer.py:440), but notes their places in the order of the gradient buffers (:300):
    with both types in one group, a save or a load takes one weight's state for another's.
    """
    for index, (fp32, bf16) in enumerate(zip(part.model_fp32_groups, part.model_float16_groups, strict=True)):
        for order, weight in enumerate([*fp32, *bf16]):
            part.model_param_group_index_map[weight] = (index, order)


def set_learning_rate(optimizer: MegatronOptimizer, lr: float, weight_decay: float) -> None:
    """Set rate and decay of every parameter group, times the group's own multipliers (norms and biases: no decay)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
