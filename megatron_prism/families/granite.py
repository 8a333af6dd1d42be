"""Granite 3: LLaMA with four factors, which the forward pass applies as they are: embedding, residual branches, q k^T, and the logits' divisor."""

from dataclasses import replace

from megatron_prism.families.family import Family
from megatron_prism.families.llama import LLAMA

MULTIPLIERS = {
    "embedding_multiplier": "embedding_multiplier",
    "residual_multiplier": "residual_multiplier",
    "attention_multiplier": "softmax_scale",
    "logits_scaling": "logits_scaling",
}
"""config.json key -> ModelConfig field; all are 1 where a config leaves them out, the softmax scale too"""

GRANITE: Family = replace(
    LLAMA,
    hf_type="granite",
    config={**LLAMA.config, **MULTIPLIERS},
    defaults={**LLAMA.defaults, **dict.fromkeys(MULTIPLIERS, 1.0)},
)
