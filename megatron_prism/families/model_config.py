"""One model's shape and constants, under megatron-core's names: what `families` reads from a config.json and the engine builds from.

No torch here: planning and `--dry-run` use it too.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RopeScaling:
    """How the inverse frequencies of rotary embeddings are stretched (transformers' `modeling_rope_utils`).

    kind "llama3": wavelengths beyond original_max_position_embeddings / low_freq_factor are divided by `factor`, those below
    original_max_position_embeddings / high_freq_factor kept, those between interpolated. kind "linear": all divided by `factor`.
    """

    kind: Literal["llama3", "linear"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only model. Sizes in elements; `vocab_size` is the model's own, without padding for parallelism."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    """head dimension; not always hidden_size / num_attention_heads"""
    vocab_size: int
    max_position_embeddings: int
    layernorm_epsilon: float
    rotary_base: float
    rope_scaling: RopeScaling | None = None
    share_embeddings_and_output_weights: bool = False
    add_bias_linear: bool = False
    """biases on the attention output and MLP projections"""
    add_qkv_bias: bool = False
    init_method_std: float = 0.02

    @property
    def query_size(self) -> int:
        """Rows of the query projection: num_attention_heads * kv_channels."""
        return self.num_attention_heads * self.kv_channels

    @property
    def kv_size(self) -> int:
        """Rows of the key projection, and of the value projection: num_query_groups * kv_channels."""
        return self.num_query_groups * self.kv_channels
