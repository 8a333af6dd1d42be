"""A ModelConfig becomes megatron-core's GPTModel, or its MambaModel for hybrids: TransformerConfig, and the chunks that this rank holds.

Owns: the choice of layers (TransformerEngine's on CUDA, ours elsewhere), the loss over the real vocabulary, the multipliers of embedding and
logits (those of the residual branches stand in `layer_specs`), and which weights stay fp32 in a bf16 run.
"""

import logging
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt import GPTModel
from megatron.core.models.mamba import MambaModel
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_prism.config import Fp8Config
from megatron_prism.engine import flash_attention, recompute
from megatron_prism.engine.device import fp8_obstacle, has_transformer_engine
from megatron_prism.engine.layer_specs import dense_spec, hybrid_spec
from megatron_prism.engine.mcore import gradient_fusion_without_apex
from megatron_prism.engine.parallel import Mesh
from megatron_prism.engine.rope import OneTable, inverse_frequencies
from megatron_prism.errors import UserError
from megatron_prism.families.model_config import ModelConfig
from megatron_prism.kernels.linear_cross_entropy import linear_cross_entropy

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16"]
Recompute = Literal["selective", "full"] | None
Layers = Literal["auto", "local", "transformer_engine"]


@dataclass(frozen=True)
class BuildOptions:
    """What a run chooses about a model beyond its config and layout."""

    precision: Precision = "fp32"
    recompute: Recompute = None
    layers: Layers = "auto"
    attention_backend: flash_attention.AttentionBackend = "auto"
    hidden_dropout: float = 0.0
    fp8: Fp8Config | None = None
    recompute_layers: int | None = None
    """with recompute="full": the first so many of a chunk; None: all"""
    keep_attention: bool = False
    """with recompute="full": attention's output is kept, and its core not computed again"""
    offload_activations: bool = False
    """with recompute="full": what recomputed layers keep waits in host memory"""
    deterministic: bool = False
    tp_comm_overlap: bool = False
    """tokens are exchanged beside the products, through buffers that `tp_overlap.start` has made"""
    fuse_gradients: bool = False
    """TransformerEngine's layers add a weight's gradient into the buffer that DDP gives it, in the product itself: only for chunks that DDP wraps"""


class LMHead(ColumnParallelLinear):
    """megatron-core's last layer, which with labels goes on to the loss: the logits of a part of the tokens at a time, never all of them.

    real_rows, first_row: how many of this rank's rows of the vocabulary are real, and the number of the first.
    """

    real_rows: int
    first_row: int

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        logits_scaling: float = 1.0,
    ) -> Any:
        """input_ [s, b, h], under sp a part of s -> with labels [b, s] the loss of each token, fp32 [b, s]; else (logits [s, b, v/tp], None).

        weight: the embedding's, where they are tied. loss_mask: as in LanguageModel.forward.
        """
        if labels is None:
            return super().forward(input_, weight, runtime_gather_output)
        weight = self.weight if weight is None else weight
        if self.sequence_parallel:
            input_ = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=False, group=self.tp_group)
        losses_t = linear_cross_entropy(
            input_.flatten(0, 1),
            weight,
            labels.t().flatten(),
            token_weights_t=None if loss_mask is None else loss_mask.t().flatten(),
            unit_gradient=loss_mask is not None and hasattr(weight, "main_grad"),  # under DDP a step's loss is the plain sum over its tokens
            logits_scaling=logits_scaling,
            real_rows=self.real_rows,
            first_row=self.first_row,
            group=self.tp_group,
        )
        return losses_t.view(input_.shape[:2]).t()


class LanguageModel(LanguageModule):
    """What megatron-core's models lack, for either of them: padded vocabulary rows take no part in the softmax, RoPE takes any scaling, and
    Granite's multipliers of embedding and logits stand in the forward pass.

    Padded rows exist so that tp divides the vocabulary. Left alone they would add exp(0) each to every softmax denominator, and the loss would
    depend on the layout.
    """

    post_process: bool

    def _finish(self, model: ModelConfig, mesh: Mesh) -> None:
        """Called at the end of __init__."""
        rows = mesh.plan.padded_vocab_size // mesh.plan.tp
        self.real_rows = min(max(model.vocab_size - mesh.tp_rank * rows, 0), rows)
        self.padded_rows = rows - self.real_rows
        self.vocabulary = model.vocab_size
        if self.post_process:
            self.output_layer.__class__ = LMHead
            self.output_layer.real_rows, self.output_layer.first_row = self.real_rows, mesh.tp_rank * rows
        self.embedding_multiplier, self.logits_scaling = model.embedding_multiplier, model.logits_scaling
        if model.position_embedding == "rope":
            rotary: Any = self.rotary_pos_emb
            rotary.__class__ = OneTable
            rotary.inv_freq = inverse_frequencies(model).to(rotary.inv_freq.device)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: None,
        decoder_input: Tensor | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """input_ids, position_ids [b, s] -> with labels [b, s] the loss of each token, fp32 [b, s], else logits [b, s, v/tp]; hidden states before
        the last stage.

        loss_mask [b, s]: what each token's loss will count times; without it the gradients cost a fourth product with the LM head.
        """
        if self.pre_process and decoder_input is None:
            decoder_input = self.embedding(input_ids=input_ids, position_ids=position_ids)
            if self.embedding_multiplier != 1.0:
                decoder_input = decoder_input * self.embedding_multiplier
            if torch.is_grad_enabled() and not decoder_input.requires_grad:  # a frozen embedding; recomputed layers want an input with one
                decoder_input.requires_grad_()
        whole = super().forward
        if not self.post_process:
            return cast(Tensor, whole(input_ids, position_ids, attention_mask, decoder_input=decoder_input, **kwargs))
        if labels is None:
            logits: Tensor = whole(input_ids, position_ids, attention_mask, decoder_input=decoder_input, **kwargs)
            return logits / self.logits_scaling if self.logits_scaling != 1.0 else logits
        self.post_process = False  # megatron-core then ends with the last hidden states
        try:
            hidden_sbh: Tensor = whole(input_ids, position_ids, attention_mask, decoder_input=decoder_input, **kwargs)
        finally:
            self.post_process = True
        shared = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        losses: Tensor = self.output_layer(hidden_sbh, weight=shared, labels=labels, loss_mask=loss_mask, logits_scaling=self.logits_scaling)
        return losses

    @torch.no_grad()
    def clear_padding(self) -> None:
        """Set this rank's padded vocabulary rows to zero; they get no gradient, so they stay zero."""
        if not self.padded_rows:
            return
        for layer in (getattr(getattr(self, "embedding", None), "word_embeddings", None), getattr(self, "output_layer", None)):
            if layer is not None and layer.weight is not None:
                layer.weight[self.real_rows :] = 0.0


class DenseModel(LanguageModel, GPTModel):
    """Every layer is attention and MLP."""

    def __init__(self, model: ModelConfig, mesh: Mesh, layers: Any, vp_stage: int | None, **kwargs: Any) -> None:
        GPTModel.__init__(self, transformer_layer_spec=layers, vp_stage=vp_stage, **model_arguments(model, mesh), **kwargs)
        self._finish(model, mesh)


class HybridModel(LanguageModel, MambaModel):
    """Layers as the pattern says: Mamba-2, attention or MLP."""

    def __init__(self, model: ModelConfig, mesh: Mesh, layers: Any, **kwargs: Any) -> None:
        MambaModel.__init__(
            self, mamba_stack_spec=layers, hybrid_override_pattern=model.hybrid_layer_pattern, **model_arguments(model, mesh), **kwargs
        )
        self._finish(model, mesh)


Chunk = DenseModel | HybridModel
"""What one rank holds of a model."""


def model_arguments(model: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """What megatron-core's GPTModel and MambaModel both are built from, beside their config and layers."""
    return {
        "vocab_size": mesh.plan.padded_vocab_size,
        "max_sequence_length": model.max_position_embeddings,
        "share_embeddings_and_output_weights": model.share_embeddings_and_output_weights,
        "position_embedding_type": model.position_embedding,
        "rotary_base": int(model.rotary_base),
        "pg_collection": mesh.groups,
    }


def shape_settings(model: ModelConfig) -> dict[str, Any]:
    """megatron-core's names for the shape of a model: what its own layers know of it too."""
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.kv_channels,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.layernorm_epsilon,
        "gated_linear_unit": model.is_gated,
        "activation_func": F.silu if model.is_gated else squared_relu,
        "window_size": None if model.sliding_window is None else (model.sliding_window - 1, 0),
        "no_rope_freq": [int(layer in model.no_rope_layers) for layer in range(model.num_layers)] if model.no_rope_layers else None,
        "is_hybrid_model": model.is_hybrid,
        "add_bias_linear": model.add_bias_linear,
        "add_qkv_bias": model.add_qkv_bias,
    }


def transformer_config(model: ModelConfig, mesh: Mesh, options: BuildOptions, device: torch.device) -> TransformerConfig:
    """megatron-core's config for this model, layout and device. calculate_per_token_loss: the loss is a mean over the global batch's tokens."""
    plan, dtype = mesh.plan, torch.bfloat16 if options.precision == "bf16" else torch.float32
    on_cuda = device.type == "cuda"
    engine = uses_transformer_engine(options, device)
    config = TransformerConfig(
        **shape_settings(model),
        softmax_scale=model.attention_scale,
        init_method_std=model.init_method_std,
        hidden_dropout=options.hidden_dropout,
        attention_dropout=0.0,
        tensor_model_parallel_size=plan.tp,
        pipeline_model_parallel_size=plan.pp,
        virtual_pipeline_model_parallel_size=plan.vpp,
        num_layers_in_first_pipeline_stage=plan.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=plan.num_layers_in_last_pipeline_stage,
        context_parallel_size=plan.cp,
        cp_comm_type=plan.cp_comm_type,
        sequence_parallel=plan.sp,
        tp_comm_overlap=options.tp_comm_overlap,
        # with two pipeline ranks "next" and "previous" are one peer: batched interleaved exchange mixes them up and trains wrongly, silently
        overlap_p2p_comm=plan.vpp is not None,
        batch_p2p_comm=plan.vpp is None,
        bf16=options.precision == "bf16",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        calculate_per_token_loss=True,
        use_cpu_initialization=not on_cuda,
        bias_activation_fusion=on_cuda and model.is_gated and not engine,
        bias_dropout_fusion=on_cuda,
        apply_rope_fusion=on_cuda and engine,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=options.fuse_gradients and engine,
        deterministic_mode=options.deterministic,
        persist_layer_norm=False,
        **_recompute_settings(options),
        **_fp8_settings(options, engine),
    )
    # set late: megatron-core would refuse squared ReLU, which is not among TransformerEngine's activations, but is among ours (`Activation`)
    config.use_te_activation_func = on_cuda and engine
    return config


def _recompute_settings(options: BuildOptions) -> dict[str, Any]:
    if options.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    if options.recompute == "full" and options.recompute_layers is not None:
        return {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": options.recompute_layers}
    if options.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {}


def _fp8_settings(options: BuildOptions, transformer_engine: bool) -> dict[str, Any]:
    """megatron-core's names for an Fp8Config. Errors: UserError where this device or environment has no FP8."""
    fp8 = options.fp8
    if fp8 is None:
        return {}
    obstacle = fp8_obstacle(fp8.recipe) if transformer_engine else "the layers are not TransformerEngine's (layers=transformer_engine, on CUDA)"
    if obstacle is not None:
        raise UserError(f"fp8.recipe={fp8.recipe} cannot run here: {obstacle}; set fp8=none")
    return {
        "fp8": fp8.formats,
        "fp8_recipe": fp8.recipe,
        "fp8_amax_history_len": fp8.amax_history_len,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": bool(fp8.bf16_layers_at_start or fp8.bf16_layers_at_end),
        "num_layers_at_start_in_bf16": fp8.bf16_layers_at_start,
        "num_layers_at_end_in_bf16": fp8.bf16_layers_at_end,
        "fp8_param": fp8.params,
    }


def uses_transformer_engine(options: BuildOptions, device: torch.device) -> bool:
    """Whether the layers come from TransformerEngine: asked for, or `auto` on CUDA where it is installed."""
    if options.layers == "transformer_engine":
        return True
    return options.layers == "auto" and device.type == "cuda" and has_transformer_engine()


def attention_obstacle(model: ModelConfig, mesh: Mesh, options: BuildOptions, device: torch.device) -> str | None:
    """Why attention does not run on FlashAttention-4; None if it does. Errors: UserError when it was asked for by name and cannot."""
    bf16, engine = options.precision == "bf16", uses_transformer_engine(options, device)
    return flash_attention.obstacle(options.attention_backend, model.kv_channels, mesh.plan.cp, bf16, options.deterministic, engine, device)


def build(model: ModelConfig, mesh: Mesh, options: BuildOptions, device: torch.device) -> list[Chunk]:
    """The chunks of the model that this rank holds, randomly initialised, on the device, in the run's precision (fp32 where bf16 is not asked for).

    One chunk, or vpp of them. Random weights depend on the layout: compare layouts from one checkpoint.
    """
    config = transformer_config(model, mesh, options, device)
    engine = uses_transformer_engine(options, device)
    if engine and mesh.plan.cp > 1 and options.precision == "fp32":
        raise UserError(
            f"parallel.cp={mesh.plan.cp} with precision=fp32: TransformerEngine's attention exchanges bf16 alone; use precision=bf16, or layers=local"
        )
    if device.type == "cuda" and not engine and mesh.rank == 0:
        logger.warning("TransformerEngine is not used (layers=%s): torch SDPA and unfused norms run instead, slower", options.layers)
    flash = attention_obstacle(model, mesh, options, device) is None
    chunks = []
    for index in range(mesh.plan.num_chunks):
        vp_stage = index if mesh.plan.vpp else None
        first = mesh.is_first_stage and index == 0
        last = mesh.is_last_stage and index == mesh.plan.num_chunks - 1
        ends = {"config": config, "pre_process": first, "post_process": last}
        chunk: Chunk
        with gradient_fusion_without_apex():
            if model.is_hybrid:
                chunk = HybridModel(model, mesh, hybrid_spec(model, config, engine, flash), **ends)
            else:
                chunk = DenseModel(model, mesh, dense_spec(model, config, engine, flash, vp_stage), vp_stage, **ends)
        if last:
            chunk.output_layer.gradient_accumulation_fusion = False
        chunk.clear_padding()
        chunks.append(chunk.to(device))
        recompute.install(chunk, options.keep_attention, options.offload_activations)
    return chunks


def to_precision(chunk: Chunk, config: TransformerConfig) -> torch.nn.Module:
    """Wrap a chunk for bf16 (outputs in fp32 at the last stage); in fp32 it is left alone.

    Weights become bf16, except those marked `keep_fp32`: Mamba's decay rates, skips and step biases, which bf16's 8 bits would move.
    """
    if not config.bf16:
        return chunk
    kept = [(weight, weight.data) for weight in chunk.parameters() if getattr(weight, "keep_fp32", False)]
    wrapped = Float16Module(config, chunk)
    for weight, data in kept:
        weight.data = data
    return wrapped


def unwrap(module: Any) -> Chunk:
    """The model inside DDP and precision wrappers."""
    while hasattr(module, "module"):
        module = module.module
    assert isinstance(module, LanguageModel)
    return module
