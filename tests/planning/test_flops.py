"""FLOPs against torch's counter on transformers' models, against published conventions, and by hand where the counter sees nothing."""

from dataclasses import replace
from math import prod
from typing import Any

import pytest
from paper_models import GRANITE_4_H_MICRO, LLAMA_8B, MISTRAL_7B, NEMOTRON_H_8B

from megatron_prism import families
from megatron_prism.planning.cost import flops_per_token, forward_flops_by_kind, recompute_flops_per_token
from megatron_prism.planning.flops import chunked_scan_flops, visible_keys

SEQ_LEN = 12
SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 61,
    "tie_word_embeddings": True, "pad_token_id": 0,
}  # fmt: skip
MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 5, "mamba_expand": 2, "mamba_chunk_size": 4}
HYBRID = {
    **SHAPE, **MAMBA, "shared_intermediate_size": 48, "num_local_experts": 0, "num_experts_per_tok": 0, "position_embedding_type": "nope",
    "layer_types": ["mamba", "attention", "mamba"],
}  # fmt: skip
NEMOTRON = {
    **SHAPE, "hybrid_override_pattern": "M-*-M-", "num_hidden_layers": 6, "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 5,
    "n_groups": 2, "chunk_size": 4, "conv_kernel": 4, "head_dim": 8, "tie_word_embeddings": False,
}  # fmt: skip


def counted(config: Any, training: bool) -> dict[str, float]:
    """FLOPs a token that torch counts in transformers' model, by ATen operation; attention computed by matrix products over the whole square."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ids = torch.arange(SEQ_LEN)[None] + 1
    with FlopCounterMode(display=False) as counter:
        logits = model(ids, use_cache=False).logits
        if training:
            logits.sum().backward()
    return {str(operation): flops / SEQ_LEN for operation, flops in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize(("model_type", "changes"), [("llama", {}), ("llama", {"head_dim": 12, "tie_word_embeddings": False}), ("granite", {})])
def test_a_dense_models_flops_are_torchs_forward_and_backward(model_type, changes):
    """transformers' eager attention computes the whole square: the full convention."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type, **{**SHAPE, **changes})
    model = families.find(config.to_dict()).model_config(config.to_dict())
    assert sum(counted(config, training=True).values()) == pytest.approx(flops_per_token(model, SEQ_LEN, causal=False), rel=1e-3)
    assert sum(counted(config, training=False).values()) == pytest.approx(sum(forward_flops_by_kind(model, SEQ_LEN, False).values()), rel=1e-3)


@pytest.mark.parametrize(("model_type", "settings"), [("granitemoehybrid", HYBRID), ("nemotron_h", NEMOTRON)])
def test_a_hybrids_matrix_products_and_convolution_are_torchs(model_type, settings):
    """torch's matrix-matrix products are the projections, the MLPs and the LM head. transformers pads the convolution on both sides and throws the
    surplus away, so it computes kernel - 1 tokens more. The scan is not compared: off the GPU, transformers writes it as elementwise products.
    """
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type, **settings)
    model = families.find(config.to_dict()).model_config(config.to_dict())
    ours, torchs = forward_flops_by_kind(model, SEQ_LEN, causal=False), counted(config, training=False)
    padded = (SEQ_LEN + model.mamba.conv_kernel - 1) / SEQ_LEN
    assert torchs.pop("aten.convolution") == pytest.approx(padded * ours.pop("Mamba-2 convolution"))
    del ours["Mamba-2 scan"], ours["attention core"]
    assert torchs["aten.mm"] == pytest.approx(sum(ours.values()))


def test_the_scan_is_megatron_lms_formula_with_the_true_d_inner():
    """Its training.py: 2 h (2 d + 2 g n + heads) + 7 d n + 2 d h a token, where d = 2 h; Nemotron-H has exactly that d."""
    kinds = forward_flops_by_kind(NEMOTRON_H_8B, 8192)
    h, d, n, heads, groups = 4096, 2 * 4096, 128, 128, 8
    expected = 24 * (2 * h * (2 * d + 2 * groups * n + heads) + 7 * d * n + 2 * d * h)
    assert kinds["Mamba-2 projections"] + kinds["Mamba-2 scan"] == expected
    assert kinds["Mamba-2 convolution"] < 1e-3 * expected
    narrow = replace(GRANITE_4_H_MICRO, mamba=replace(GRANITE_4_H_MICRO.mamba, num_heads=32))
    assert forward_flops_by_kind(narrow, 8192)["Mamba-2 scan"] == 36 * 7 * 32 * 64 * 128


def test_the_chunked_scan_executes_the_products_of_its_four_einsums():
    """Counted by torch on the einsums of the algorithm: scores, their product with x, chunk states, the states' part of the output."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    mamba = replace(NEMOTRON_H_8B.mamba, num_heads=4, head_dim=3, state_dim=5, num_groups=2, chunk_size=8)
    chunks, q = 3, mamba.chunk_size
    x = torch.ones(chunks, q, mamba.num_heads, mamba.head_dim)
    bc = torch.ones(chunks, q, mamba.num_groups, mamba.state_dim)
    per_head = bc.repeat_interleave(mamba.num_heads // mamba.num_groups, dim=2)
    with FlopCounterMode(display=False) as counter:
        scores = torch.einsum("clgn,csgn->cgls", bc, bc).repeat_interleave(mamba.num_heads // mamba.num_groups, dim=1)
        torch.einsum("chls,cshp->clhp", scores, x)
        states = torch.einsum("clhn,clhp->chpn", per_head, x)
        torch.einsum("clhn,chpn->clhp", per_head, states)
    assert counter.get_total_flops() == chunked_scan_flops(mamba) * prod((chunks, q))


def test_flops_per_token_follow_both_conventions_of_the_field():
    """LLaMA-3-8B, GFLOP per token: 51.47 causal and 57.91 full at 8,192 tokens; 148.1 and 251.2 at 131,072 (Megatron-LM's and NeMo's formulas)."""
    found = [round(flops_per_token(LLAMA_8B, length, causal) / 1e9, 2) for length in (8192, 131072) for causal in (True, False)]
    assert found == pytest.approx([51.47, 57.91, 148.1, 251.2], rel=2e-3)


@pytest.mark.parametrize("seq_len", [1000, 4096, 8192, 32768])
def test_a_sliding_window_counts_the_keys_that_its_mask_shows(seq_len):
    """The mean over queries of min(position + 1, window), to the half key that the convention seq_len / 2 leaves out."""
    shown = sum(min(query + 1, 4096) for query in range(seq_len)) / seq_len
    assert visible_keys(MISTRAL_7B, seq_len, causal=True) == pytest.approx(shown, abs=0.5)
    assert visible_keys(MISTRAL_7B, seq_len, causal=False) == min(seq_len, 4096)


def test_recomputation_is_told_apart():
    for model in (LLAMA_8B, NEMOTRON_H_8B):
        forward = forward_flops_by_kind(model, 8192)
        assert recompute_flops_per_token(model, 8192, None) == 0
        assert recompute_flops_per_token(model, 8192, "selective") == forward["attention core"]
        assert recompute_flops_per_token(model, 8192, "full") == pytest.approx(
            flops_per_token(model, 8192) / 3 - 2 * model.hidden_size * model.vocab_size
        )
        assert recompute_flops_per_token(model, 8192, "full", share=0.25) == recompute_flops_per_token(model, 8192, "full") / 4
