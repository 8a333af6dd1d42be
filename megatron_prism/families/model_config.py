"""One model's shape and constants, under megatron-core's names: what `families` reads from a config.json and the engine builds from.

No torch here: planning and `--dry-run` use it too.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RopeScaling:
    """How the inverse frequencies of rotary embeddings are stretched (transformers' `modeling_rope_utils`).

    kind "llama3": wavelengths beyond original_max_position_embeddings / low_freq_factor are divided by `factor`, those below
    original_max_position_embeddings / high_freq_factor kept, those between interpolated. kind "linear": all divided by `factor`. kind "yarn"
    (Peng et al. 2023, arXiv 2309.00071): waves that turn beta_fast times in original_max_position_embeddings are kept, those that turn beta_slow
    times divided by `factor`, a ramp over the channels between (its ends whole channels if `truncate`); queries and keys grow by attention_factor.
    """

    kind: Literal["llama3", "linear", "yarn"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True)
class MambaConfig:
    """The Mamba-2 mixer of a hybrid model (Dao & Gu 2024, arXiv 2405.21060). Sizes in elements."""

    num_heads: int
    head_dim: int
    state_dim: int
    num_groups: int
    """groups of heads that share one B and one C"""
    conv_kernel: int
    chunk_size: int
    """tile of the scan; does not change the result"""
    norm_groups: int
    """equal groups of channels, each normalised alone by the gated norm: num_groups in both Granite-4-H and Nemotron-H"""
    time_step_limit: tuple[float, float] = (0.0, float("inf"))
    """bounds of softplus(dt + dt_bias)"""
    conv_bias: bool = True

    @property
    def d_inner(self) -> int:
        """Channels of x, z and the output: num_heads * head_dim."""
        return self.num_heads * self.head_dim

    @property
    def bc_size(self) -> int:
        """Channels of B and C together: 2 * num_groups * state_dim."""
        return 2 * self.num_groups * self.state_dim

    @property
    def conv_size(self) -> int:
        """Channels of the convolution, [x | B | C]."""
        return self.d_inner + self.bc_size

    @property
    def conv_width(self) -> int:
        """Input channels of each of the convolution's filters: it is depthwise."""
        return 1

    @property
    def in_proj_size(self) -> int:
        """Rows of the input projection, [z | x | B | C | dt]."""
        return 2 * self.d_inner + self.bc_size + self.num_heads


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only model. Sizes in elements; `vocab_size` is the model's own, without padding for parallelism.

    Layers are megatron-core's: with `hybrid_layer_pattern`, each symbol is one (M Mamba-2, * attention, - MLP); without, each is attention + MLP.
    """

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
    activation: Literal["swiglu", "squared_relu"] = "swiglu"
    """swiglu: down(silu(gate) * up); squared_relu: down(relu(up)^2), without a gate"""
    sliding_window: int | None = None
    """keys that a query sees, itself among them; None: all before it"""
    position_embedding: Literal["rope", "none"] = "rope"
    no_rope_layers: tuple[int, ...] = ()
    """layers (from 0) whose attention does without rotary embeddings"""
    embedding_multiplier: float = 1.0
    """factor of the embedding's output"""
    residual_multiplier: float = 1.0
    """factor of every branch when it is added to the residual stream"""
    softmax_scale: float | None = None
    """factor of q k^T; None: kv_channels ** -0.5"""
    logits_scaling: float = 1.0
    """divisor of the logits"""
    hybrid_layer_pattern: str | None = None
    layers_per_block: int = 1
    """megatron-core layers that make up one layer of the Hugging Face model"""
    mamba: MambaConfig | None = None

    @property
    def attention_scale(self) -> float | None:
        """Factor of q k^T, with that of YaRN on both of them; None: kv_channels ** -0.5."""
        turned = 1.0 if self.rope_scaling is None else self.rope_scaling.attention_factor
        if turned == 1.0:
            return self.softmax_scale
        return (self.kv_channels**-0.5 if self.softmax_scale is None else self.softmax_scale) * turned**2

    @property
    def is_hybrid(self) -> bool:
        """Whether layers differ, so that megatron-core's hybrid model is built."""
        return self.hybrid_layer_pattern is not None

    @property
    def is_gated(self) -> bool:
        """Whether the MLP has a gate projection."""
        return self.activation == "swiglu"

    @property
    def layer_symbols(self) -> tuple[str, ...]:
        """For each megatron-core layer, the symbols of what it holds: "*-" everywhere in a dense model."""
        return tuple(self.hybrid_layer_pattern) if self.hybrid_layer_pattern is not None else ("*-",) * self.num_layers

    @property
    def query_size(self) -> int:
        """Rows of the query projection: num_attention_heads * kv_channels."""
        return self.num_attention_heads * self.kv_channels

    @property
    def kv_size(self) -> int:
        """Rows of the key projection, and of the value projection: num_query_groups * kv_channels."""
        return self.num_query_groups * self.kv_channels
