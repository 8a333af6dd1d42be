"""A bare megatron-core training loop: the measure that our engine is never to fall below.

megatron-core's own GPTModel or MambaModel with its TransformerEngine layers (its local ones on a CPU), its DDP, its distributed optimizer and its
schedule, over random tokens that lie on the device already; nothing of ours but the shape of the model. Every switch of megatron-core that helps is
on: fused weight gradients, rotary embedding, SwiGLU, bias-dropout-add and TransformerEngine's cross-entropy, reduction and gathering that overlap,
the FP8 recipe, the recomputation, the type of gradients and the split master weights of the case (its "precision-aware" optimizer). Weights stay in
bf16 with FP8 (`fp8.params` makes its optimizer slower), moments in fp32 (TransformerEngine's AdamW widens bf16 ones in every step).
Not there: Granite's multipliers, RoPE scaling, masks of padded vocabulary rows.
"""

import importlib.util
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_prism.engine import loop, mcore
from megatron_prism.engine.bench.cases import Case
from megatron_prism.engine.bench.clock import Timeline
from megatron_prism.engine.bench.sides import free, read, time_schedule
from megatron_prism.engine.data import MicroBatch
from megatron_prism.engine.device import has_transformer_engine
from megatron_prism.engine.model import model_arguments, shape_settings, transformer_config
from megatron_prism.engine.parallel import Mesh

POOL = 32
"""micro-batches of random tokens that lie on the device, taken in turn"""
AS_OURS = ("fp8", "recompute", "first_last_layers_bf16", "num_layers_at", "deterministic_mode")
"""beginnings of the settings that are the case's, not the loop's: the same work on both sides"""


class BareLoop:
    """megatron-core and nothing else, on the shapes of a case."""

    def __init__(self, case: Case, mesh: Mesh, device: torch.device) -> None:
        self.timeline, self.plan, self.seq_len = Timeline(device), mesh.plan, case.train.data.seq_len
        self.engine = device.type == "cuda" and has_transformer_engine()
        self.notes = differences(case, self.engine)
        self.batches = pool(case, mesh, device)
        config = bare_config(case, mesh, device, self.engine)
        model = bare_model(case, mesh, config, self.engine).to(device)
        overlap = device.type == "cuda" and mesh.plan.dp * mesh.plan.cp > 1
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=case.train.optimizer.gradients == "fp32",
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap,
            use_distributed_optimizer=True,
            check_for_nan_in_grad=False,
        )
        self.model = DistributedDataParallel(config, ddp, Float16Module(config, model) if config.bf16 else model, pg_collection=mesh.groups)
        self.optimizer = bare_optimizer(case, self.model)
        config.finalize_model_grads_func, config.grad_scale_func = finalize_model_grads, self.optimizer.scale_loss
        config.no_sync_func = self.model.no_sync if overlap else None
        time_schedule(config, self.timeline)
        self.taken, self.losses = 0, list[dict[str, Tensor]]()

    def step(self) -> None:
        """One step; waits for the device where megatron-core's optimizer does."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.losses = get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=None,
            model=[self.model],
            num_microbatches=self.plan.num_microbatches,
            seq_length=self.seq_len,
            micro_batch_size=self.plan.micro_batch,
            forward_only=False,
        )
        with self.timeline.span("optimizer"):
            self.optimizer.step()

    def _forward(self, iterator: None, model: Any) -> Any:
        batch = self.batches[self.taken % len(self.batches)]
        self.taken += 1

        def mean(loss_bs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss = loss_bs.float().mean()
            return loss, {"loss": loss.detach().clone()}  # the schedule divides the other by the number of micro-batches, in place

        return model(batch.tokens, batch.positions, None, labels=batch.labels), mean

    def loss(self) -> float:
        """Mean of this rank's last micro-batches."""
        return sum(float(found["loss"]) for found in self.losses) / len(self.losses)

    def parameters(self) -> int:
        """On this rank."""
        return sum(weight.numel() for weight in self.model.parameters())

    def close(self) -> None:
        """Free the model."""
        free([self.model], self.optimizer)


def differences(case: Case, engine: bool) -> list[str]:
    """What a reader should know of the work that this loop does and does not do."""
    model, found = case.model, [] if engine else ["megatron-core's local layers: TransformerEngine is not used on this device"]
    if (model.embedding_multiplier, model.residual_multiplier, model.logits_scaling) != (1.0, 1.0, 1.0):
        found.append("without the model's multipliers, which megatron-core does not have")
    if case.train.optimizer.moments == "bf16":
        found.append("moments in fp32: TransformerEngine's AdamW would copy bf16 ones to fp32 and back in every step")
    if model.is_hybrid and case.train.recompute == "full":
        found.append("nothing is recomputed: megatron-core's hybrid stack cannot")
    return found


def pool(case: Case, mesh: Mesh, device: torch.device) -> list[MicroBatch]:
    """Micro-batches of the case's data for this rank, on the device, with this context-parallel rank's two slices of each sequence."""
    reader, plan = read(case), mesh.plan
    found = []
    for number in range(POOL):
        first = (number * plan.dp + mesh.dp_rank) * plan.micro_batch
        batch = reader.micro_batch(range(first, first + plan.micro_batch))
        found.append(batch if plan.cp == 1 else batch.cut(plan.cp, mesh.cp_rank))
    reader.close()
    return [MicroBatch(*(getattr(batch, name).to(device) for name in batch.__dataclass_fields__)) for batch in found]


def bare_config(case: Case, mesh: Mesh, device: torch.device, engine: bool) -> TransformerConfig:
    """megatron-core's config: the shape, precision and recomputation of the case, and every fusion that there is on the device."""
    model, plan, on_cuda, bf16 = case.model, mesh.plan, device.type == "cuda", case.train.precision == "bf16"
    ours = vars(transformer_config(model, mesh, loop.build_options(case.train), device))
    shared = {name: value for name, value in ours.items() if name.startswith(AS_OURS)}
    mamba = model.mamba
    settings: dict[str, Any] = {} if mamba is None else {
        "mamba_state_dim": mamba.state_dim,
        "mamba_head_dim": mamba.head_dim,
        "mamba_num_groups": mamba.num_groups,
        "mamba_num_heads": mamba.num_heads,
    }  # fmt: skip
    return TransformerConfig(
        **shape_settings(model),
        hidden_dropout=case.train.hidden_dropout,
        attention_dropout=0.0,
        tensor_model_parallel_size=plan.tp,
        context_parallel_size=plan.cp,
        cp_comm_type="p2p" if plan.cp > 1 else None,
        sequence_parallel=plan.sp,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        pipeline_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_cpu_initialization=not on_cuda,
        bias_activation_fusion=on_cuda and model.is_gated,
        bias_dropout_fusion=on_cuda,
        apply_rope_fusion=engine,
        masked_softmax_fusion=engine,
        attention_softmax_in_fp32=not engine,
        gradient_accumulation_fusion=engine,
        cross_entropy_loss_fusion=engine,
        cross_entropy_fusion_impl="te" if engine else "native",
        **{**settings, **shared, "fp8_param": False},
    )


def bare_model(case: Case, mesh: Mesh, config: TransformerConfig, engine: bool) -> Any:
    """megatron-core's model for the config."""
    model = case.model
    shared = {"config": config, **model_arguments(model, mesh)}
    built: Any
    with mcore.gradient_fusion_without_apex():
        if model.is_hybrid:
            from megatron.core.models.mamba import MambaModel
            from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec

            built = MambaModel(mamba_stack_spec=mamba_stack_spec, hybrid_override_pattern=model.hybrid_layer_pattern, **shared)
        else:
            spec = get_gpt_layer_with_transformer_engine_spec() if engine else get_gpt_layer_local_spec(normalization="RMSNorm")
            built = GPTModel(transformer_layer_spec=spec, **shared)
    built.output_layer.gradient_accumulation_fusion = engine and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    return built


def bare_optimizer(case: Case, model: DistributedDataParallel) -> Any:
    """The distributed optimizer, with the case's AdamW and, where its master weights are split, megatron-core's own form of that."""
    adamw, bf16 = case.train.optimizer, case.train.precision == "bf16"
    split: dict[str, Any] = {} if not adamw.split_master else {
        "use_precision_aware_optimizer": True,
        "store_param_remainders": True,
        "main_grads_dtype": torch.bfloat16 if adamw.gradients == "bf16" else torch.float32,
    }  # fmt: skip
    settings = mcore.optimizer_config(
        lr=adamw.lr,
        min_lr=0.0,
        weight_decay=adamw.weight_decay,
        adam_beta1=adamw.betas[0],
        adam_beta2=adamw.betas[1],
        adam_eps=adamw.eps,
        clip_grad=adamw.clip_grad or 0.0,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        **split,
    )
    return get_megatron_optimizer(settings, [model])
