"""A ModelConfig becomes megatron-core's GPTModel: its TransformerConfig, its layer spec, and the chunks that this rank holds.

Owns: the choice of layers (TransformerEngine's on CUDA, ours elsewhere) and the masking of padded vocabulary rows.
"""

import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_prism.engine.attention import CausalAttention, RMSNorm
from megatron_prism.engine.device import has_transformer_engine
from megatron_prism.engine.parallel import Mesh
from megatron_prism.engine.rope import inverse_frequencies
from megatron_prism.families.model_config import ModelConfig

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
    hidden_dropout: float = 0.0


class LanguageModel(GPTModel):
    """megatron-core's GPTModel, with two differences: padded vocabulary rows take no part in the softmax, and RoPE takes any scaling.

    Padded rows exist so that tp divides the vocabulary. Left alone they would add exp(0) each to every softmax denominator, and the loss would
    depend on the layout.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh, **kwargs: Any) -> None:
        super().__init__(vocab_size=mesh.plan.padded_vocab_size, max_sequence_length=model.max_position_embeddings, **kwargs)
        rows = mesh.plan.padded_vocab_size // mesh.plan.tp
        self.real_rows = min(max(model.vocab_size - mesh.tp_rank * rows, 0), rows)
        self.padded_rows = rows - self.real_rows
        self.rotary_pos_emb.inv_freq = inverse_frequencies(model).to(self.rotary_pos_emb.inv_freq.device)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [b, s], logits [s, b, v/tp] -> cross-entropy of each token [b, s]; the softmax runs over the real vocabulary."""
        if self.padded_rows:
            logits[..., self.real_rows :] = torch.finfo(logits.dtype).min
        loss: Tensor = super().compute_language_model_loss(labels, logits)
        return loss

    @torch.no_grad()
    def clear_padding(self) -> None:
        """Set this rank's padded vocabulary rows to zero; they get no gradient, so they stay zero."""
        if not self.padded_rows:
            return
        for layer in (getattr(getattr(self, "embedding", None), "word_embeddings", None), getattr(self, "output_layer", None)):
            if layer is not None and layer.weight is not None:
                layer.weight[self.real_rows :] = 0.0


def transformer_config(model: ModelConfig, mesh: Mesh, options: BuildOptions, device: torch.device) -> TransformerConfig:
    """megatron-core's config for this model, layout and device. calculate_per_token_loss: the loss is a mean over the global batch's tokens."""
    plan, dtype = mesh.plan, torch.bfloat16 if options.precision == "bf16" else torch.float32
    on_cuda = device.type == "cuda"
    recompute: dict[str, Any] = {}
    if options.recompute == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif options.recompute == "selective":
        recompute = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=model.layernorm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        init_method_std=model.init_method_std,
        hidden_dropout=options.hidden_dropout,
        attention_dropout=0.0,
        tensor_model_parallel_size=plan.tp,
        pipeline_model_parallel_size=plan.pp,
        virtual_pipeline_model_parallel_size=plan.vpp,
        context_parallel_size=plan.cp,
        sequence_parallel=plan.sp,
        # with two pipeline ranks "next" and "previous" are one peer: batched interleaved exchange mixes them up and trains wrongly, silently
        overlap_p2p_comm=plan.vpp is not None,
        batch_p2p_comm=plan.vpp is None,
        bf16=options.precision == "bf16",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        calculate_per_token_loss=True,
        use_cpu_initialization=not on_cuda,
        bias_activation_fusion=on_cuda,
        bias_dropout_fusion=on_cuda,
        apply_rope_fusion=on_cuda and uses_transformer_engine(options, device),
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        cross_entropy_loss_fusion=on_cuda and options.precision == "bf16",
        cross_entropy_fusion_impl="native",
        **recompute,
    )


def uses_transformer_engine(options: BuildOptions, device: torch.device) -> bool:
    """Whether the layers come from TransformerEngine: asked for, or `auto` on CUDA where it is installed."""
    if options.layers == "transformer_engine":
        return True
    return options.layers == "auto" and device.type == "cuda" and has_transformer_engine()


def layer_spec(config: TransformerConfig, transformer_engine: bool, vp_stage: int | None) -> Any:
    """The layers of one chunk: TransformerEngine's, or megatron-core's own parallel linears with our norm and attention."""
    if transformer_engine:
        return get_gpt_layer_with_transformer_engine_spec()
    spec = get_gpt_layer_local_spec(normalization=config.normalization)
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.self_attention.submodules.core_attention = CausalAttention
    return TransformerBlockSubmodules(layer_specs=[spec] * get_num_layers_to_build(config, vp_stage=vp_stage), layer_norm=RMSNorm)


def build(model: ModelConfig, mesh: Mesh, options: BuildOptions, device: torch.device) -> list[LanguageModel]:
    """The chunks of the model that this rank holds, randomly initialised, on the device, in the run's precision (fp32 where bf16 is not asked for).

    One chunk, or vpp of them. Random weights depend on the layout: compare layouts from one checkpoint.
    """
    config = transformer_config(model, mesh, options, device)
    engine = uses_transformer_engine(options, device)
    if device.type == "cuda" and not engine and mesh.rank == 0:
        logger.warning("TransformerEngine is not used (layers=%s): torch SDPA and unfused norms run instead, slower", options.layers)
    chunks = []
    for index in range(mesh.plan.num_chunks):
        vp_stage = index if mesh.plan.vpp else None
        first = mesh.is_first_stage and index == 0
        last = mesh.is_last_stage and index == mesh.plan.num_chunks - 1
        chunk = LanguageModel(
            model,
            mesh,
            config=config,
            transformer_layer_spec=layer_spec(config, engine, vp_stage),
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_base=int(model.rotary_base),
            pg_collection=mesh.groups,
            vp_stage=vp_stage,
        )
        chunk.clear_padding()
        chunks.append(chunk.to(device))
    return chunks


def to_precision(chunk: LanguageModel, config: TransformerConfig) -> torch.nn.Module:
    """Wrap a chunk for bf16 (weights in bf16, outputs in fp32 at the last stage); in fp32 it is left alone."""
    return Float16Module(config, chunk) if config.bf16 else chunk


def unwrap(module: Any) -> LanguageModel:
    """The LanguageModel inside DDP and precision wrappers."""
    while hasattr(module, "module"):
        module = module.module
    assert isinstance(module, LanguageModel)
    return module
