"""Rules that families share: one function for each kind of layer, which differ only in Hugging Face names. No torch."""

from dataclasses import replace

from megatron_prism.families.rules import Copy, CopyGateUp, FuseGateUp, FuseQKV, Tied

LAYER = "model.layers.{i}."
EMBEDDING = Copy(hf="model.embed_tokens.weight", key="embedding.word_embeddings.weight", sizes=("vocab_size", "hidden_size"), tp_axis=0, padded=True)
"""the embedding's rule; families under other names replace `hf`"""


def output_layer(embedding: str) -> tuple[Copy, Tied]:
    """The two rules of the output layer: its own weight, or the embedding's."""
    shape, tied = ("vocab_size", "hidden_size"), "share_embeddings_and_output_weights"
    own = Copy(hf="lm_head.weight", key="output_layer.weight", sizes=shape, tp_axis=0, padded=True, when=f"not {tied}")
    return own, Tied("lm_head.weight", same_as=embedding, when=tied)


def final_norm(hf: str) -> tuple[Copy, Copy]:
    """The rules of the last norm, which megatron-core's hybrid model calls otherwise."""
    dense = Copy(hf=hf, key="decoder.final_layernorm.weight", sizes=("hidden_size",), when="not is_hybrid")
    return dense, replace(dense, key="decoder.final_norm.weight", when="is_hybrid")


def attention(hf: str, norm: str) -> tuple[Copy | FuseQKV, ...]:
    """The rules of a layer's attention. TransformerEngine fuses the norm before it into its first linear layer, and megatron-core's global names
    follow that in every layer spec. hf: the attention's prefix, `{i}` in it; norm: the norm's name."""
    key = "decoder.layers.self_attention."
    return (
        Copy(at="*", hf=norm, key=key + "linear_qkv.layer_norm_weight", sizes=("hidden_size",)),
        FuseQKV(at="*", hf=hf + "{qkv}_proj.weight", key=key + "linear_qkv.weight", columns=("hidden_size",)),
        FuseQKV(at="*", hf=hf + "{qkv}_proj.bias", key=key + "linear_qkv.bias", when="add_qkv_bias"),
        Copy(at="*", hf=hf + "o_proj.weight", key=key + "linear_proj.weight", sizes=("hidden_size", "query_size"), tp_axis=1),
        Copy(at="*", hf=hf + "o_proj.bias", key=key + "linear_proj.bias", sizes=("hidden_size",), when="add_bias_linear"),
    )


def mlp_in(hf: str, norm: str, rule: type[FuseGateUp | CopyGateUp] = FuseGateUp) -> tuple[Copy | FuseGateUp | CopyGateUp, ...]:
    """The rules of the norm before a gated MLP and of its first linear layer. hf: the layer's name without `weight`."""
    key = "decoder.layers.mlp.linear_fc1."
    return (
        Copy(at="-", hf=norm, key=key + "layer_norm_weight", sizes=("hidden_size",)),
        rule(at="-", hf=hf + "weight", key=key + "weight", columns=("hidden_size",)),
        rule(at="-", hf=hf + "bias", key=key + "bias", when="add_bias_linear"),
    )


def mlp_out(hf: str) -> tuple[Copy, Copy]:
    """The rules of an MLP's second linear layer."""
    key = "decoder.layers.mlp.linear_fc2."
    return (
        Copy(at="-", hf=hf + "weight", key=key + "weight", sizes=("hidden_size", "ffn_hidden_size"), tp_axis=1),
        Copy(at="-", hf=hf + "bias", key=key + "bias", sizes=("hidden_size",), when="add_bias_linear"),
    )


def mamba(hf: str, norm: str) -> tuple[Copy, ...]:
    """The rules of a Mamba-2 mixer and the norm before it, all in Hugging Face's own row order. hf: the mixer's prefix, `{i}` in it."""
    key = "decoder.layers.mixer."
    heads, inner = ("mamba.num_heads",), ("mamba.d_inner",)
    return (
        Copy(at="M", hf=norm, key=key + "in_proj.layer_norm_weight", sizes=("hidden_size",)),
        Copy(at="M", hf=hf + "in_proj.weight", key=key + "in_proj.weight", sizes=("mamba.in_proj_size", "hidden_size")),
        Copy(at="M", hf=hf + "conv1d.weight", key=key + "conv1d.weight", sizes=("mamba.conv_size", "mamba.conv_width", "mamba.conv_kernel")),
        Copy(at="M", hf=hf + "conv1d.bias", key=key + "conv1d.bias", sizes=("mamba.conv_size",), when="mamba.conv_bias"),
        *(Copy(at="M", hf=hf + name, key=key + name, sizes=heads, keep_fp32=True) for name in ("A_log", "D", "dt_bias")),
        Copy(at="M", hf=hf + "norm.weight", key=key + "norm.weight", sizes=inner),
        Copy(at="M", hf=hf + "out_proj.weight", key=key + "out_proj.weight", sizes=("hidden_size", "mamba.d_inner")),
    )
