"""Model FLOPs per token, by kind of work: what the field divides by the peak to say how well a run uses its devices.

A multiply and an add are two; the backward pass is twice the forward; an embedding lookup is nothing, the LM head counts; norms, activations and
rotations are left out; recomputation is never model FLOPs (`recompute_flops_per_token` tells it apart).

Attention has two conventions. Causal: only the keys that a query may see, seq_len / 2 on average. Full: as if there were no causal mask. They differ
by 1.7x for an 8B model at 128k tokens. A sliding window of W keys is kept in both: W - W^2 / (2 seq_len) keys, and W.

Mamba-2's scan is counted as the recurrence, 7 * d_inner * state_dim per token, which is Megatron-LM's formula (its training.py) and does not
depend on the implementation; with d_inner the model's true num_heads * head_dim, where Megatron-LM takes 2 * hidden_size. Chunked kernels execute
something else (`chunked_scan_flops`): more with longer chunks. Either way the scan is a few percent of the layer.
"""

from megatron_prism.families.model_config import MambaConfig, ModelConfig
from megatron_prism.planning.parameters import layer_counts

ATTENTION_CORE, LM_HEAD = "attention core", "LM head"


def forward_flops_by_kind(model: ModelConfig, seq_len: int, causal: bool = True) -> dict[str, float]:
    """Forward FLOPs for one token of a sequence of seq_len, all layers together, by kind of work."""
    counts, hidden = layer_counts(model), model.hidden_size
    found = {
        "attention projections": counts["*"] * 2.0 * hidden * (2 * model.query_size + 2 * model.kv_size),
        ATTENTION_CORE: counts["*"] * 4.0 * model.query_size * visible_keys(model, seq_len, causal),
        "MLP": counts["-"] * 2.0 * hidden * model.ffn_hidden_size * (3 if model.is_gated else 2),
    }
    if model.mamba is not None:
        mamba = model.mamba
        found["Mamba-2 projections"] = counts["M"] * 2.0 * hidden * (mamba.in_proj_size + mamba.d_inner)
        found["Mamba-2 convolution"] = counts["M"] * 2.0 * mamba.conv_size * mamba.conv_kernel
        found["Mamba-2 scan"] = counts["M"] * 7.0 * mamba.d_inner * mamba.state_dim
    return {**found, LM_HEAD: 2.0 * hidden * model.vocab_size}


def flops_per_token(model: ModelConfig, seq_len: int, causal: bool = True) -> float:
    """Model FLOPs of forward and backward for one token of a sequence of seq_len, without recomputation."""
    return 3.0 * sum(forward_flops_by_kind(model, seq_len, causal).values())


def recompute_flops_per_token(
    model: ModelConfig, seq_len: int, recompute: str | None, causal: bool = True, share: float = 1.0, keep_attention: bool = False
) -> float:
    """FLOPs that recomputation adds to a token: selective repeats the attention cores, full this share of the layers (not the LM head).

    keep_attention: full without the attention cores.
    """
    forward = forward_flops_by_kind(model, seq_len, causal)
    if recompute == "full":
        return share * (sum(forward.values()) - forward[LM_HEAD] - (forward[ATTENTION_CORE] if keep_attention else 0.0))
    return forward[ATTENTION_CORE] if recompute == "selective" else 0.0


def visible_keys(model: ModelConfig, seq_len: int, causal: bool) -> float:
    """Keys that a query meets, the mean over a sequence."""
    window = min(model.sliding_window or seq_len, seq_len)
    return window - window**2 / (2 * seq_len) if causal else float(window)


def chunked_scan_flops(mamba: MambaConfig) -> float:
    """FLOPs per token that the chunked algorithm (arXiv 2405.21060, listing 1) executes in its matrix products, one layer's forward.

    With chunks of Q: C B^T inside the chunk for each group, its product with x for each head, the states of the chunks, and their part of the output.
    """
    inside = 2.0 * mamba.chunk_size * (mamba.num_groups * mamba.state_dim + mamba.d_inner)
    return inside + 4.0 * mamba.d_inner * mamba.state_dim
