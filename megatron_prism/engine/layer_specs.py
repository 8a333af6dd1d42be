"""Which modules a layer is made of: TransformerEngine's, or megatron-core's parallel linears with our norm and attention; dense and hybrid.

Owns: the module specs, Granite's residual multiplier (through megatron-core's pluggable bias-dropout-add), the hybrid stack, and the MLP's
activation as a module, where the config says use_te_activation_func.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_prism.engine.attention import CausalAttention, RMSNorm
from megatron_prism.engine.flash_attention import FlashAttention
from megatron_prism.engine.mamba import mixer_spec
from megatron_prism.families.model_config import ModelConfig
from megatron_prism.kernels.mlp_activation import squared_relu, swiglu

BiasDropoutAdd = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


def bias_dropout_add(multiplier: float) -> Callable[[bool, bool], BiasDropoutAdd]:
    """megatron-core's residual + dropout(x + bias), with x and bias times `multiplier`; used by attention, MLP and Mamba alike.

    Without dropout the multiplier is part of the addition's one pass over memory (alpha).
    """
    if multiplier == 1.0:
        return get_bias_dropout_add

    def choose(training: bool, fused: bool) -> BiasDropoutAdd:
        plain = get_bias_dropout_add(training, fused)

        def add(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            x, bias = x_with_bias
            if dropout == 0.0 or not training:
                return torch.add(residual, x if bias is None else x + bias, alpha=multiplier)
            added: Tensor = plain((x * multiplier, None if bias is None else bias * multiplier), residual, dropout)
            return added

        return add

    return choose


def dense_spec(model: ModelConfig, config: TransformerConfig, transformer_engine: bool, flash: bool, vp_stage: int | None) -> Any:
    """The layers of one chunk of a GPTModel. flash: FlashAttention-4 is the core of TransformerEngine's attention."""
    layer = _transformer_layer(model, config, transformer_engine, flash)
    if transformer_engine:
        return layer
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=vp_stage), layer_norm=RMSNorm)


def hybrid_spec(model: ModelConfig, config: TransformerConfig, transformer_engine: bool, flash: bool) -> ModuleSpec:
    """The stack of a MambaModel: a Mamba-2, an attention and an MLP layer, each with its norm and residual."""
    assert model.mamba is not None
    whole = _transformer_layer(model, config, transformer_engine, flash).submodules
    keys = whole.sharded_state_dict_keys_map
    attention = TransformerLayerSubmodules(
        input_layernorm=whole.input_layernorm,
        self_attention=whole.self_attention,
        self_attn_bda=whole.self_attn_bda,
        sharded_state_dict_keys_map={key: value for key, value in keys.items() if key.startswith("input_layernorm.")},
    )
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=whole.pre_mlp_layernorm,
        mlp=whole.mlp,
        mlp_bda=whole.mlp_bda,
        sharded_state_dict_keys_map={key: value for key, value in keys.items() if key.startswith("pre_mlp_layernorm.")},
    )
    norm = _final_norm(transformer_engine)
    mamba = mixer_spec(
        transformer_engine,
        model.mamba,
        config.tensor_model_parallel_size,
        norm=norm,
        bias_dropout_add=bias_dropout_add(model.residual_multiplier),
    )
    recompute = config.recompute_granularity == "full"
    mamba.module = RecomputedMambaLayer if recompute else MambaLayer
    submodules = MambaStackSubmodules(
        mamba_layer=mamba,
        attention_layer=ModuleSpec(module=RecomputedAttentionLayer if recompute else TransformerLayer, submodules=attention),
        mlp_layer=ModuleSpec(module=RecomputedMLPLayer if recompute else MLPLayer, submodules=mlp),
    )
    return ModuleSpec(module=HybridStack, params={"norm": norm}, submodules=submodules)


def _transformer_layer(model: ModelConfig, config: TransformerConfig, transformer_engine: bool, flash: bool) -> ModuleSpec:
    """Attention and MLP, with the residual multiplier."""
    if transformer_engine:
        spec = get_gpt_layer_with_transformer_engine_spec()
        if flash:
            spec.submodules.self_attention.submodules.core_attention = FlashAttention
    else:
        spec = get_gpt_layer_local_spec(normalization=config.normalization)
        spec.submodules.input_layernorm = RMSNorm
        spec.submodules.pre_mlp_layernorm = RMSNorm
        spec.submodules.self_attention.submodules.core_attention = CausalAttention
    if config.use_te_activation_func:
        mlp = spec.submodules.mlp  # megatron-core 0.19 hands it on as a partial
        (mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules).activation_func = Activation
    spec.submodules.self_attn_bda = spec.submodules.mlp_bda = bias_dropout_add(model.residual_multiplier)
    return spec


class Activation(torch.nn.Module):
    """What megatron-core's MLP calls between its linears, after adding their bias where there is one: our kernel in place of TransformerEngine's."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gated = config.gated_linear_unit

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, 2f] -> [s, b, f], or as wide as it came where it is not gated."""
        return swiglu(x) if self.gated else squared_relu(x)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing; the MLP asks each of its modules."""
        return {}


def _final_norm(transformer_engine: bool) -> type:
    if not transformer_engine:
        return RMSNorm
    from megatron.core.extensions.transformer_engine import TENorm

    norm: type = TENorm
    return norm


class HybridStack(MambaStack):
    """megatron-core's hybrid stack and what its dense one has: a norm that is not TransformerEngine's, full recomputation, dropout under sp."""

    def __init__(self, config: TransformerConfig, submodules: MambaStackSubmodules, norm: type, post_layer_norm: bool = True, **kwargs: Any) -> None:
        super().__init__(config, submodules, post_layer_norm=False, **kwargs)
        # the layers recompute themselves, in every version; megatron-core 0.19's stack would recompute what they do once more
        self.config = copy.copy(config)
        self.config.recompute_granularity = None
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As MambaStack.forward; ranks with different parts of the sequence draw different dropout masks, as in transformer_block.py:706."""
        with tensor_parallel.get_cuda_rng_tracker().fork() if self.config.sequence_parallel else nullcontext():
            hidden: Tensor = super().forward(*args, **kwargs)
        return hidden


class Recomputed(torch.nn.Module):
    """A layer that keeps its input alone while training and runs again in the backward pass."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        """The layer's own forward: hidden states, or (hidden states, no context) of a TransformerLayer."""
        layer: Any = super()
        if not self.training:
            return layer.forward(hidden_states=hidden_states, **kwargs)
        returns_pair = isinstance(self, TransformerLayer)

        def run(hidden: Tensor) -> Tensor:
            out: Any = layer.forward(hidden_states=hidden, **kwargs)
            first: Tensor = out[0] if returns_pair else out
            return first

        out = tensor_parallel.checkpoint(run, False, hidden_states)
        return (out, None) if returns_pair else out


class RecomputedMambaLayer(Recomputed, MambaLayer):
    """Mamba-2, computed twice."""


class RecomputedAttentionLayer(Recomputed, TransformerLayer):
    """Attention, computed twice."""


class RecomputedMLPLayer(Recomputed, MLPLayer):
    """An MLP, computed twice."""
