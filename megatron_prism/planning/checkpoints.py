"""Bytes of a training checkpoint: on disk, and on a rank's host while it is written in the background."""

from megatron_prism.families.model_config import ModelConfig
from megatron_prism.planning import cost
from megatron_prism.planning.layout import ParallelPlan
from megatron_prism.planning.memory import memory
from megatron_prism.planning.training import Training

STATE_BYTES = 12
"""of a trained weight: master weight and two moments, stored in fp32 whatever the run keeps them in"""


def disk_bytes(model: ModelConfig, training: Training) -> int:
    """Of one checkpoint whose weights are all trained; of one that trains a part, at most."""
    return cost.num_parameters(model) * (training.value_bytes + STATE_BYTES)


def host_bytes(model: ModelConfig, plan: ParallelPlan, seq_len: int, training: Training) -> int:
    """Of the copy that the fullest rank writes: its share of the optimizer's state, and the weights, which the first of their copies writes."""
    need = memory(model, plan, seq_len, training)
    trained = need.gradients // training.gradient_bytes
    return need.weights + trained * STATE_BYTES // (plan.dp * plan.cp)


def describe(model: ModelConfig, plan: ParallelPlan, seq_len: int, training: Training, in_background: bool) -> str:
    """A line for the dry run."""
    line = f"checkpoint: {disk_bytes(model, training) / 2**30:.2f} GiB on disk"
    if in_background:
        line += f"; written in the background: up to {host_bytes(model, plan, seq_len, training) / 2**30:.2f} GiB of host memory a rank"
    return line
