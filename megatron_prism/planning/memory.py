"""Bytes that a rank holds while training: the fullest pipeline stage of a plan.

Weights, fp32 gradients and the distributed optimizer's share are exact (but for A_log, D and dt_bias of Mamba-2, which stay fp32 in a bf16 model: a
few KiB a layer). Activations are an estimate: what each kind of layer keeps for its backward pass with fused norms, flash attention and the scan's
kernels, as in Korthikanti et al. 2022 (arXiv 2205.05198). On one and two H200s the total was met within 3 % (docs/plan.md).
Not counted: the CUDA context, NCCL's buffers, the kernels' workspaces, fragmentation. `MARGIN` is left free for them.
"""

from dataclasses import dataclass

from megatron_prism.families.model_config import ModelConfig
from megatron_prism.planning.layout import ParallelPlan
from megatron_prism.planning.parameters import layer_parameters, local_bc_size

MARGIN = 0.1
"""share of a device's memory that an estimate must leave free"""
LOGIT_BYTES = 8
"""of one logit at the peak, in its backward pass: the logit and its gradient in bf16, its softmax in fp32; or two in fp32"""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that one rank holds while training, by kind; the fullest rank of the plan."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All four kinds."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def fits(self, memory_gib: float) -> bool:
        """Whether a device of this size holds it, with `MARGIN` to spare."""
        return self.total <= (1 - MARGIN) * memory_gib * 2**30


def memory(model: ModelConfig, plan: ParallelPlan, seq_len: int, bf16: bool, recompute: str | None) -> MemoryPlan:
    """Bytes on the fullest rank. recompute: None, "selective" or "full".

    Selective recomputes attention's core, whose inputs and output are kept anyway: with flash attention it frees nothing worth counting.
    """
    stages = range(plan.pp)
    return max((_stage_memory(model, plan, stage, seq_len, bf16, recompute) for stage in stages), key=lambda need: need.total)


def _stage_memory(model: ModelConfig, plan: ParallelPlan, stage: int, seq_len: int, bf16: bool, recompute: str | None) -> MemoryPlan:
    symbols = [model.layer_symbols[layer] for layer in plan.stage_layers(model.num_layers)[stage]]
    weights = sum(layer_parameters(model, symbol, plan.tp) for layer in symbols for symbol in layer) + _end_weights(model, plan, stage)
    size = 2 if bf16 else 4
    tokens = seq_len * plan.micro_batch // plan.cp
    kept = sum(_kept(model, plan, layer, recompute) for layer in symbols)
    temporary = size * max(_working(model, plan, layer, recompute) for layer in symbols)
    if stage == plan.pp - 1:
        temporary = max(temporary, LOGIT_BYTES * plan.padded_vocab_size // plan.tp)
    activations = int(tokens * (kept * size * _in_flight(plan, stage) + temporary))
    per_weight = 12 if bf16 else 8
    return MemoryPlan(weights * size, weights * 4, weights * per_weight // (plan.dp * plan.cp), activations)


def _end_weights(model: ModelConfig, plan: ParallelPlan, stage: int) -> int:
    """Embedding on the first stage, final norm and LM head on the last; where they are tied, each of two stages has its copy."""
    table = plan.padded_vocab_size // plan.tp * model.hidden_size
    first, last = stage == 0, stage == plan.pp - 1
    shared = first and last and model.share_embeddings_and_output_weights
    return table * (first + last - shared) + (model.hidden_size if last else 0)


def _in_flight(plan: ParallelPlan, stage: int) -> float:
    """Micro-batches whose activations a stage keeps at once (1F1B; interleaved: chunks of warm-up and one more, in stages' worth)."""
    if plan.vpp is None:
        return min(plan.pp - stage, plan.num_microbatches)
    chunks = 2 * (plan.pp - stage - 1) + (plan.vpp - 1) * plan.pp + 1
    return min(chunks / plan.vpp, plan.num_microbatches)


def _kept(model: ModelConfig, plan: ParallelPlan, symbols: str, recompute: str | None) -> int:
    """Values per token that one layer keeps for its backward pass: all of it, or its input alone where it is recomputed."""
    if recompute == "full":
        return model.hidden_size // _sequence_cut(plan)
    return sum(_activation_values(model, plan, symbol) for symbol in symbols)


def _working(model: ModelConfig, plan: ParallelPlan, symbols: str, recompute: str | None) -> int:
    """Values per token that exist only while one layer's backward pass runs: its widest gradient, and what was recomputed."""
    again = sum(_activation_values(model, plan, symbol) for symbol in symbols) if recompute == "full" else 0
    return again + max(_widest(model, plan.tp, symbol) for symbol in symbols)


def _activation_values(model: ModelConfig, plan: ParallelPlan, symbol: str) -> int:
    """Values per token that a layer of a kind computes and its backward pass needs.

    Each: the norm's input and output. Attention: q, k, v (also rotated), its output. MLP: fc1's output, fc2's input. Mamba-2: in_proj's output, the
    convolution's, the scan's, the gated norm's.
    """
    around = 2 * model.hidden_size // _sequence_cut(plan)
    if symbol == "*":
        rotated = model.query_size + model.kv_size if model.position_embedding == "rope" else 0
        return around + (2 * model.query_size + 2 * model.kv_size + rotated) // plan.tp
    if symbol == "-":
        return around + (3 if model.is_gated else 2) * model.ffn_hidden_size // plan.tp
    mamba = model.mamba
    assert mamba is not None
    return around + (5 * mamba.d_inner + mamba.num_heads) // plan.tp + 2 * local_bc_size(model, plan.tp)


def _widest(model: ModelConfig, tp: int, symbol: str) -> int:
    """Values per token of the widest gradient; for Mamba-2 also the states of all chunks and their gradients, in fp32."""
    if symbol == "*":
        return (model.query_size + 2 * model.kv_size) // tp
    if symbol == "-":
        return (2 if model.is_gated else 1) * model.ffn_hidden_size // tp
    mamba = model.mamba
    assert mamba is not None
    return (mamba.in_proj_size + 4 * mamba.d_inner * mamba.state_dim // mamba.chunk_size) // tp


def _sequence_cut(plan: ParallelPlan) -> int:
    return plan.tp if plan.sp else 1
