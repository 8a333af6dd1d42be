"""What a model costs: parameters, FLOPs and bytes, as pure functions of its ModelConfig and plan, gathered; and the text of a dry run."""

from megatron_prism.families.model_config import ModelConfig
from megatron_prism.planning.flops import flops_per_token, forward_flops_by_kind, recompute_flops_per_token
from megatron_prism.planning.layout import ParallelPlan
from megatron_prism.planning.memory import MemoryPlan, memory
from megatron_prism.planning.parameters import layer_parameters, num_parameters, parameters_by_part
from megatron_prism.planning.training import Training

__all__ = [
    "MemoryPlan",
    "Training",
    "describe_run",
    "flops_per_token",
    "forward_flops_by_kind",
    "layer_parameters",
    "memory",
    "num_parameters",
    "parameters_by_part",
    "peak_tflops",
    "readable_bytes",
    "recompute_flops_per_token",
]

PEAK_BF16_TFLOPS = {"NVIDIA H100": 989.0, "NVIDIA H200": 989.0, "NVIDIA A100": 312.0, "NVIDIA B200": 2250.0}
"""Dense bf16 peak of a device, by the start of its name (NVIDIA's data sheets, without sparsity)."""


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak of a device by its name, in TFLOP/s; None where it is not known."""
    return next((peak for name, peak in PEAK_BF16_TFLOPS.items() if device_name.startswith(name)), None)


def describe_run(model: ModelConfig, plan: ParallelPlan, steps: int, global_batch: int, seq_len: int, training: Training) -> str:
    """The dry run's text: mesh, parameters, bytes per rank by kind, tokens, FLOPs in both conventions and what recomputation adds."""
    tokens = steps * global_batch * seq_len
    need = memory(model, plan, seq_len, training)
    kinds = ", ".join(f"{kind} {readable_bytes(getattr(need, kind))}" for kind in ("weights", "gradients", "optimizer", "activations"))
    causal, full = (flops_per_token(model, seq_len, causal) * tokens for causal in (True, False))
    share = training.recomputed_share(plan, model.num_layers)
    extra = recompute_flops_per_token(model, seq_len, training.recompute, share=share, keep_attention=training.keep_attention) * tokens
    layers = f" of {share * model.num_layers:.0f} of {model.num_layers} layers" if training.recompute_layers else ""
    kept = " without attention's core" if training.keep_attention else ""
    again = f"recompute={training.recompute}{layers}{kept} adds {extra:.3e}, {extra / causal:.0%}" if training.recompute else "nothing is recomputed"
    return "\n".join(
        [
            f"mesh         {plan.describe()}; {plan.num_microbatches} micro-batches of {plan.micro_batch} per step",
            f"parameters   {num_parameters(model):,} ({model.family})",
            f"per rank     {readable_bytes(need.total)} on the fullest: {kinds} (estimate)",
            f"bytes        {training.describe()}",
            f"tokens       {tokens:,} = {steps:,} steps x {global_batch:,} sequences x {seq_len:,}",
            f"model FLOPs  {causal:.3e} (causal attention), {full:.3e} (full attention); {again}",
            *(["graphs       no exchange beside the passes; while validating the room of one stays taken"] if training.cuda_graphs else []),
            *([f"note         {note}"] if (note := length_note(model, seq_len)) else []),
        ]
    )


def length_note(model: ModelConfig, seq_len: int) -> str | None:
    """What to know of sequences longer than the model has been trained on; None for others."""
    if seq_len <= model.max_position_embeddings:
        return None
    return f"{seq_len:,} tokens exceed max_position_embeddings={model.max_position_embeddings:,}: the model has not been trained on such lengths"


def readable_bytes(count: float) -> str:
    """4.2 GiB, 17 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.4g} {unit}"
        count /= 1024
    raise AssertionError
