"""How many parameters a model has, by part and by kind of layer, whole or on one tensor-parallel rank. Exact, from its ModelConfig alone.

Kinds of layers are the symbols of `ModelConfig.layer_symbols`: * attention, - MLP, M Mamba-2, each with the norm before it.
"""

from collections import Counter

from megatron_prism.families.model_config import ModelConfig

NAMES = {"*": "attention", "-": "MLP", "M": "Mamba-2"}
"""Symbol of a kind of layer -> its name."""


def layer_counts(model: ModelConfig) -> Counter[str]:
    """Layers of each kind; a dense model's layer counts as attention and as MLP."""
    return Counter(symbol for symbols in model.layer_symbols for symbol in symbols)


def layer_parameters(model: ModelConfig, symbol: str, tp: int = 1) -> int:
    """Weights of one layer of a kind with its norm, on one of tp ranks."""
    return {"*": _attention, "-": _mlp, "M": _mamba}[symbol](model, tp) + model.hidden_size


def linear_parameters(model: ModelConfig, symbol: str, tp: int = 1) -> int:
    """Weights of one layer's linear projections, biases left out, on one of tp ranks."""
    if symbol == "*":
        return model.hidden_size * (2 * model.query_size + 2 * model.kv_size) // tp
    if symbol == "-":
        return model.hidden_size * (3 if model.is_gated else 2) * model.ffn_hidden_size // tp
    mamba = model.mamba
    assert mamba is not None
    return model.hidden_size * ((3 * mamba.d_inner + mamba.num_heads) // tp + local_bc_size(model, tp))


def parameters_by_part(model: ModelConfig) -> dict[str, int]:
    """Parameters of the whole model by part: a tied embedding once, vocabulary padding left out; a Mamba-2 mixer with its gated norm."""
    counts = layer_counts(model)
    table = model.vocab_size * model.hidden_size
    parts = {"embedding": table, "LM head": 0 if model.share_embeddings_and_output_weights else table}
    parts |= {NAMES[symbol]: count * (layer_parameters(model, symbol) - model.hidden_size) for symbol, count in counts.items()}
    parts["norms"] = (sum(counts.values()) + 1) * model.hidden_size
    return parts


def num_parameters(model: ModelConfig) -> int:
    """All weights, a tied embedding counted once, vocabulary padding left out."""
    return sum(parameters_by_part(model).values())


def local_bc_size(model: ModelConfig, tp: int) -> int:
    """Channels of B and C on one of tp ranks: groups are cut over the ranks; every rank makes all of them where ranks outnumber the groups."""
    assert model.mamba is not None
    return model.mamba.bc_size if model.mamba.num_groups % tp else model.mamba.bc_size // tp


def _attention(model: ModelConfig, tp: int) -> int:
    qkv_rows = model.query_size + 2 * model.kv_size
    cut = model.hidden_size * (qkv_rows + model.query_size)
    cut += qkv_rows if model.add_qkv_bias or model.add_bias_linear else 0
    return cut // tp + (model.hidden_size if model.add_bias_linear else 0)


def _mlp(model: ModelConfig, tp: int) -> int:
    fc1_rows = (2 if model.is_gated else 1) * model.ffn_hidden_size
    cut = model.hidden_size * (fc1_rows + model.ffn_hidden_size) + (fc1_rows if model.add_bias_linear else 0)
    return cut // tp + (model.hidden_size if model.add_bias_linear else 0)


def _mamba(model: ModelConfig, tp: int) -> int:
    """in_proj, convolution, A_log, D and dt_bias, gated norm, out_proj."""
    mamba = model.mamba
    assert mamba is not None
    d_inner, heads, bc_size = mamba.d_inner // tp, mamba.num_heads // tp, local_bc_size(model, tp)
    in_proj = model.hidden_size * (2 * d_inner + bc_size + heads)
    convolution = (d_inner + bc_size) * (mamba.conv_kernel + (1 if mamba.conv_bias else 0))
    return in_proj + convolution + 3 * heads + d_inner + d_inner * model.hidden_size
