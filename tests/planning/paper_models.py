"""The paper's seven models and SmolLM3 as ModelConfigs written by hand, apart from the config.json files that the project ships."""

from dataclasses import replace

from megatron_prism.families.model_config import MambaConfig, ModelConfig, RopeScaling

LLAMA_8B = ModelConfig(
    family="llama", num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8, kv_channels=128,
    vocab_size=128256, max_position_embeddings=131072, layernorm_epsilon=1e-5, rotary_base=5e5, rope_scaling=RopeScaling("llama3", 8.0),
)  # fmt: skip
MISTRAL_7B = replace(LLAMA_8B, family="mistral", vocab_size=32000, sliding_window=4096)
MISTRAL_24B = replace(LLAMA_8B, family="mistral", num_layers=40, hidden_size=5120, ffn_hidden_size=32768, vocab_size=131072)
GRANITE_8B = replace(
    LLAMA_8B, family="granite", num_layers=40, ffn_hidden_size=12800, vocab_size=49152, share_embeddings_and_output_weights=True,
)  # fmt: skip
GRANITE_4_MICRO = replace(
    GRANITE_8B, hidden_size=2560, ffn_hidden_size=8192, num_attention_heads=40, kv_channels=64, vocab_size=100352,
)  # fmt: skip
GRANITE_4_H_MICRO = replace(
    GRANITE_4_MICRO, num_layers=80, hidden_size=2048, num_attention_heads=32, position_embedding="none", layers_per_block=2,
    hybrid_layer_pattern="".join("*-" if layer in (5, 15, 25, 35) else "M-" for layer in range(40)),
    mamba=MambaConfig(num_heads=64, head_dim=64, state_dim=128, num_groups=1, conv_kernel=4, chunk_size=256, norm_groups=1),
)  # fmt: skip
NEMOTRON_H_8B = replace(
    LLAMA_8B, family="nemotron_h", num_layers=52, ffn_hidden_size=21504, vocab_size=131072, position_embedding="none", activation="squared_relu",
    hybrid_layer_pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
    mamba=MambaConfig(num_heads=128, head_dim=64, state_dim=128, num_groups=8, conv_kernel=4, chunk_size=128, norm_groups=8),
)  # fmt: skip
SMOLLM3_3B = replace(
    LLAMA_8B, family="smollm3", num_layers=36, hidden_size=2048, ffn_hidden_size=11008, num_attention_heads=16, num_query_groups=4,
    share_embeddings_and_output_weights=True,
)  # fmt: skip

BILLIONS = {
    "granite-3.3-8b": (GRANITE_8B, 8.171),
    "granite-4.0-micro": (GRANITE_4_MICRO, 3.403),
    "granite-4.0-h-micro": (GRANITE_4_H_MICRO, 3.191),
    "llama-3.1-8b": (LLAMA_8B, 8.030),
    "mistral-7b-v0.1": (MISTRAL_7B, 7.242),
    "mistral-small-24b": (MISTRAL_24B, 23.572),
    "nemotron-h-8b": (NEMOTRON_H_8B, 8.101),
    "smollm3-3b": (SMOLLM3_3B, 3.075),
}
"""Model -> its shape, and its published number of parameters in billions."""
