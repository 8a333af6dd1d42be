"""Bytes that a rank holds while training: the fullest pipeline stage of a plan.

Weights, gradients and the distributed optimizer's share are exact (but for A_log, D and dt_bias of Mamba-2, which stay fp32 in a bf16 model: a few
KiB a layer, and for blockwise FP8's scales). Activations are an estimate: what each kind of layer keeps for its backward pass with fused norms, flash
attention and the scan's kernels, as in Korthikanti et al. 2022 (arXiv 2205.05198), and the LM head's loss by its kernels, a chunk of logits at a
time. It is about GPUs: on the CPU the loss makes all logits, which is not counted. How near H200s were: docs/plan.md.
Not counted: the CUDA context, NCCL's buffers, the kernels' workspaces, fragmentation. `MARGIN` is left free for them.
"""

from dataclasses import dataclass

from megatron_prism.families.model_config import ModelConfig
from megatron_prism.planning.layout import ParallelPlan
from megatron_prism.planning.parameters import layer_parameters, linear_parameters, local_bc_size
from megatron_prism.planning.training import Training

MARGIN = 0.1
"""share of a device's memory that an estimate must leave free"""
CHUNK_BYTES = 512 * 2**20
"""most bytes of logits that exist at once (kernels/linear_cross_entropy/head.py)"""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that one rank holds while training, by kind; the fullest rank of the plan."""

    weights: int
    """with their FP8 copies"""
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


def memory(model: ModelConfig, plan: ParallelPlan, seq_len: int, training: Training) -> MemoryPlan:
    """Bytes on the fullest rank.

    Selective recomputation repeats attention's core, whose inputs and output are kept anyway: with flash attention it frees nothing worth counting.
    """
    return max((_stage_memory(model, plan, stage, seq_len, training) for stage in range(plan.pp)), key=lambda need: need.total)


def loss_bytes(plan: ParallelPlan, model: ModelConfig, seq_len: int, training: Training) -> int:
    """What the loss takes on the last stage while it runs: a chunk of logits, gradients of the hidden states and of the head. Among `activations`."""
    return _loss(model, plan, seq_len * plan.micro_batch // plan.cp, training)


def _stage_memory(model: ModelConfig, plan: ParallelPlan, stage: int, seq_len: int, training: Training) -> MemoryPlan:
    layers = plan.stage_layers(model.num_layers)[stage]
    symbols = [symbol for layer in layers for symbol in model.layer_symbols[layer]]
    in_fp8 = [symbol for layer in layers if training.in_fp8(layer, model.num_layers) for symbol in model.layer_symbols[layer]]
    weights = sum(layer_parameters(model, symbol, plan.tp) for symbol in symbols) + _end_weights(model, plan, stage)
    copied = sum(linear_parameters(model, symbol, plan.tp) for symbol in in_fp8)
    # attention's projections are trained without the norm before them
    trained = weights if training.trainable == "all" else symbols.count("*") * (layer_parameters(model, "*", plan.tp) - model.hidden_size)
    return MemoryPlan(
        weights * training.value_bytes + copied * training.fp8_weight_bytes,
        trained * training.gradient_bytes,
        (trained * training.state_bytes + copied * training.fp8_master_bytes) // (plan.dp * plan.cp),
        _activations(model, plan, stage, seq_len, training),
    )


def _activations(model: ModelConfig, plan: ParallelPlan, stage: int, seq_len: int, training: Training) -> int:
    """The largest of three: during the loss, during the backward pass of the layers that keep their values, of those that run again.

    The latter come first in their chunk, so their backward pass comes last, when the others' values are gone.
    """
    layers = [_layer(model, plan, layer, training) for layer in plan.stage_layers(model.num_layers)[stage]]
    per_chunk, tokens = len(layers) // plan.num_chunks, seq_len * plan.micro_batch // plan.cp
    again = [layer for position, layer in enumerate(layers) if training.is_recomputed(position % per_chunk)]
    whole = [layer for position, layer in enumerate(layers) if not training.is_recomputed(position % per_chunk)]
    kept = (_kept_of(again, training) + sum(layer.values for layer in whole)) * _in_flight(plan, stage)
    peaks = [tokens * (kept + max((layer.gradient for layer in whole), default=0))]
    if again:
        gone = sum(layer.values for layer in whole) / plan.num_chunks
        peaks.append(tokens * (kept - gone + max(layer.values + layer.gradient for layer in again)))
    if stage == plan.pp - 1:
        peaks.append(tokens * kept + _loss(model, plan, tokens, training))
    return int(max(peaks) + (_validation(model, plan, tokens, layers, training) if training.cuda_graphs else 0))


def _validation(model: ModelConfig, plan: ParallelPlan, tokens: int, layers: "list[_Layer]", training: Training) -> int:
    """Bytes that a forward pass alone takes at most, beside the room that graphs keep: hidden states and one layer's values, or a chunk of logits."""
    hidden, logits = model.hidden_size * training.value_bytes, plan.padded_vocab_size // plan.tp * training.value_bytes
    return tokens * hidden + max(tokens * max(layer.values for layer in layers), min(CHUNK_BYTES, tokens * logits))


def _kept_of(again: "list[_Layer]", training: Training) -> int:
    """Bytes per token of what recomputed layers keep; of those that keep it in host memory, one that leaves or comes and the one in use."""
    kept = [layer.input + (layer.attention if training.keep_attention else 0) for layer in again]
    return sum(sorted(kept)[-2:]) if training.offload_activations else sum(kept)


def _loss(model: ModelConfig, plan: ParallelPlan, tokens: int, training: Training) -> int:
    """Bytes of the LM head's loss: its gradient of the hidden states (under sp beside the gathered states), and the larger of two that do not meet.

    A chunk of logits in the forward pass, where the weight's gradient is added to DDP's buffer; in the backward pass autograd's copy of it, a dummy.
    """
    size, rows = training.value_bytes, plan.padded_vocab_size // plan.tp
    states = tokens * model.hidden_size * size * (2 if plan.sp else 1)
    return states + max(min(CHUNK_BYTES, tokens * rows * size), rows * model.hidden_size * size)


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


@dataclass(frozen=True)
class _Layer:
    """Bytes per token of one layer."""

    values: int
    """computed forward, needed backward"""
    gradient: int
    """its widest, which exists for a moment"""
    input: int
    """what it keeps when it is recomputed"""
    attention: int
    """attention's output, for each head the sum of its softmax in fp32, and under context parallelism the keys and values that came last; with the
    exchange of tokens for heads (a2a) queries and output in that form too"""


def _layer(model: ModelConfig, plan: ParallelPlan, layer: int, training: Training) -> _Layer:
    symbols, fp8, size = model.layer_symbols[layer], training.in_fp8(layer, model.num_layers), training.value_bytes
    values = 0
    for symbol in symbols:
        plain, of_linear, shared = _activation_values(model, plan, symbol)
        values += size * plain + ((of_linear + shared) if fp8 else size * of_linear)
    received = 2 * model.kv_size if plan.cp > 1 else 0
    if plan.cp > 1 and plan.cp_comm_type == "a2a":
        received += 2 * model.query_size
    attention = symbols.count("*") * (size * (model.query_size + received) + 4 * model.num_attention_heads) // plan.tp
    gradient = max(_gradient_bytes(model, plan.tp, symbol, size) for symbol in symbols)
    return _Layer(values, gradient, size * (model.hidden_size // _sequence_cut(plan)), attention)


def _activation_values(model: ModelConfig, plan: ParallelPlan, symbol: str) -> tuple[int, int, int]:
    """Values per token that a layer of a kind keeps: plain ones; inputs of linear layers, FP8 where they are; plain ones that are such inputs too.

    Each: the norm's input and its output (an input). Attention: q, k, v (also rotated), its output (plain and an input). MLP: fc1's output, fc2's
    input. Mamba-2: in_proj's output, the convolution's, the scan's, the gated norm's (an input).
    """
    hidden = model.hidden_size // _sequence_cut(plan)
    if symbol == "*":
        rotated = model.query_size + model.kv_size if model.position_embedding == "rope" else 0
        return hidden + (2 * model.query_size + 2 * model.kv_size + rotated) // plan.tp, hidden, model.query_size // plan.tp
    if symbol == "-":
        return hidden + (2 if model.is_gated else 1) * model.ffn_hidden_size // plan.tp, hidden + model.ffn_hidden_size // plan.tp, 0
    mamba = model.mamba
    assert mamba is not None
    plain = (4 * mamba.d_inner + mamba.num_heads) // plan.tp + 2 * local_bc_size(model, plan.tp)
    return hidden + plain, hidden + mamba.d_inner // plan.tp, 0


def _gradient_bytes(model: ModelConfig, tp: int, symbol: str, size: int) -> int:
    """Bytes per token of the widest gradient; for Mamba-2 also the states of all chunks and their gradients, in fp32."""
    if symbol == "*":
        return size * (model.query_size + 2 * model.kv_size) // tp
    if symbol == "-":
        return size * (2 if model.is_gated else 1) * model.ffn_hidden_size // tp
    mamba = model.mamba
    assert mamba is not None
    return (size * mamba.in_proj_size + 8 * mamba.d_inner * mamba.state_dim // mamba.chunk_size) // tp


def _sequence_cut(plan: ParallelPlan) -> int:
    return plan.tp if plan.sp else 1
