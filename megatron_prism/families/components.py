"""The parts of a model that recipes speak of: a weight's part, by megatron-core's name of it. For merging by part, and for training some parts alone.

| part | megatron-core's weights | Hugging Face's (LLaMA, Mistral, Granite, SmolLM3; Nemotron-H's layers have one `mixer` each) |
| --- | --- | --- |
| embeddings | `embedding.word_embeddings` | `embed_tokens`; with tied embeddings the LM head is this one too |
| attention | `self_attention.linear_qkv`, `.linear_proj` | `self_attn.{q,k,v,o}_proj` |
| mlp | `mlp.linear_fc1`, `.linear_fc2` | `mlp.*`, `shared_mlp.*` |
| mamba | `mixer.*`, with the gated norm inside it | `mamba.*` |
| norms | the norm before each of these, and the last one | `*layernorm`, `norm`, `norm_f` |
| lm_head | `output_layer` | `lm_head` |

Biases go with their matrices. No torch.
"""

from collections.abc import Iterable
from typing import Literal, get_args

from megatron_prism.families.family import Family
from megatron_prism.families.model_config import ModelConfig

Component = Literal["embeddings", "attention", "mlp", "mamba", "norms", "lm_head"]
COMPONENTS: tuple[Component, ...] = get_args(Component)
Trainable = Literal["all", "attention"]
"""what a run trains: every weight, or attention's projections alone (the two variants of PRISM's 128k stage)"""
_PARTS: dict[str, Component] = {
    "embedding.": "embeddings",
    "output_layer.": "lm_head",
    "layer_norm": "norms",  # TransformerEngine's names, and the checkpoints': a norm inside the linear layer after it
    "layernorm": "norms",
    "final_norm": "norms",
    "self_attention.": "attention",
    "mixer.": "mamba",
    "mlp.": "mlp",
    ".norm.weight": "norms",  # before a hybrid's mixer, in a model whose layers are not TransformerEngine's
}
"""the first that a weight's name holds says its part"""


def component(key: str) -> Component:
    """The part that a weight belongs to: megatron-core's name of it, in a model or in a checkpoint."""
    return next(part for mark, part in _PARTS.items() if mark in key)


def components_of(family: Family, model: ModelConfig) -> list[Component]:
    """The parts that a model has."""
    return _ordered(component(entry.rule.key) for entry in family.rules(model))


def _ordered(found: Iterable[Component]) -> list[Component]:
    here = set(found)
    return [part for part in COMPONENTS if part in here]
