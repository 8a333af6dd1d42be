"""What a model costs: parameters, FLOPs and bytes, as pure functions of its ModelConfig and plan.

FLOPs count a multiply and an add as two, the backward pass as twice the forward, attention as causal (half the square) unless told otherwise,
recomputation never. Both conventions of the field are given, because they differ by 1.7x for an 8B model at 128k tokens.
"""

from dataclasses import dataclass

from megatron_prism.families.model_config import ModelConfig
from megatron_prism.planning.layout import ParallelPlan

PEAK_BF16_TFLOPS = {"NVIDIA H100": 989.0, "NVIDIA H200": 989.0, "NVIDIA A100": 312.0, "NVIDIA B200": 2250.0}
"""Dense bf16 peak of a device, by the start of its name (NVIDIA's data sheets, without sparsity)."""


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


def layer_parameters(model: ModelConfig) -> int:
    """Weights of one transformer layer: attention, gated MLP, two norms, biases where the model has them."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    qkv_rows = model.query_size + 2 * model.kv_size
    weights = hidden * qkv_rows + model.query_size * hidden + 3 * hidden * ffn + 2 * hidden
    if model.add_qkv_bias or model.add_bias_linear:
        weights += qkv_rows
    if model.add_bias_linear:
        weights += 2 * hidden + 2 * ffn
    return weights


def num_parameters(model: ModelConfig) -> int:
    """All weights, a tied embedding counted once, vocabulary padding left out."""
    embeddings = model.vocab_size * model.hidden_size * (1 if model.share_embeddings_and_output_weights else 2)
    return model.num_layers * layer_parameters(model) + embeddings + model.hidden_size


def flops_per_token(model: ModelConfig, seq_len: int, causal: bool = True) -> float:
    """Model FLOPs of forward and backward for one token of a sequence of seq_len, without recomputation."""
    hidden = model.hidden_size
    matmuls = hidden * (model.query_size + 2 * model.kv_size) + model.query_size * hidden + 3 * hidden * model.ffn_hidden_size
    attention = 2 * seq_len * model.query_size * (0.5 if causal else 1.0)
    return 3.0 * 2.0 * (model.num_layers * (matmuls + attention) + hidden * model.vocab_size)


def memory(model: ModelConfig, plan: ParallelPlan, seq_len: int, bf16: bool, recompute: str | None) -> MemoryPlan:
    """Bytes on the fullest rank: weights, fp32 gradients, the distributed optimizer's share, and an estimate of activations.

    Activations: sequence * batch * hidden * layer bytes as in Korthikanti et al. 2022 (arXiv 2205.05198, Eq. 1 to 4 with flash attention:
    no scores are kept), times the micro-batches in flight of the first pipeline stage, plus the logits of one micro-batch in fp32.
    """
    layers = model.num_layers // plan.pp
    embedding = plan.padded_vocab_size * model.hidden_size // plan.tp
    both_ends = plan.pp == 1 and not model.share_embeddings_and_output_weights
    weights = layers * layer_parameters(model) // plan.tp + embedding * (2 if both_ends else 1) + model.hidden_size
    size = 2 if bf16 else 4
    per_weight = 12 if bf16 else 8
    tokens = seq_len * plan.micro_batch // plan.cp
    in_flight = min(plan.pp, plan.num_microbatches)
    activations = tokens * _activation_values(model, plan, recompute) * size * layers * in_flight
    logits = tokens * plan.padded_vocab_size // plan.tp * (4 + size)
    return MemoryPlan(weights * size, weights * 4, weights * per_weight // (plan.dp * plan.cp), activations + logits)


def _activation_values(model: ModelConfig, plan: ParallelPlan, recompute: str | None) -> int:
    """Values that one layer keeps per token on one rank: norms and residuals, then what tensor parallelism cuts."""
    shared = plan.tp if plan.sp else 1
    if recompute == "full":
        return model.hidden_size // shared
    outside = 4 * model.hidden_size // shared
    inside = (2 * model.query_size + 2 * model.kv_size + 4 * model.ffn_hidden_size) // plan.tp
    return outside + inside


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak of a device by its name, in TFLOP/s; None where it is not known."""
    return next((peak for name, peak in PEAK_BF16_TFLOPS.items() if device_name.startswith(name)), None)


def describe_run(model: ModelConfig, plan: ParallelPlan, steps: int, global_batch: int, seq_len: int, bf16: bool, recompute: str | None) -> str:
    """The dry run's text: mesh, parameters, bytes per rank by kind, tokens, FLOPs in both conventions."""
    tokens = steps * global_batch * seq_len
    need = memory(model, plan, seq_len, bf16, recompute)
    kinds = ", ".join(f"{kind} {_bytes(getattr(need, kind))}" for kind in ("weights", "gradients", "optimizer", "activations"))
    causal, full = (flops_per_token(model, seq_len, causal) * tokens for causal in (True, False))
    return "\n".join(
        [
            f"mesh         {plan.describe()}; {plan.num_microbatches} micro-batches of {plan.micro_batch} per step",
            f"parameters   {num_parameters(model):,} ({model.family})",
            f"per rank     {_bytes(need.total)} on the fullest: {kinds} (estimate)",
            f"tokens       {tokens:,} = {steps:,} steps x {global_batch:,} sequences x {seq_len:,}",
            f"model FLOPs  {causal:.3e} (causal attention), {full:.3e} (full attention); recompute not counted",
        ]
    )


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.4g} {unit}"
        count /= 1024
    raise AssertionError
