"""From times to what is reported: medians, rates, shares, ratios of sides that took turns. Pure functions; no torch."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from megatron_prism.families.model_config import ModelConfig
from megatron_prism.planning.flops import flops_per_token

CONFIDENCE = 0.95
PARTS = ("data", "forward", "backward", "graph", "reduction", "optimizer")
"""graph: forward and backward of a micro-batch whose passes are CUDA graphs"""


def summary(step_ms: Sequence[float]) -> dict[str, Any]:
    """Median, fastest, slowest and mean of some steps."""
    return {
        "median": statistics.median(step_ms),
        "min": min(step_ms),
        "max": max(step_ms),
        "mean": statistics.fmean(step_ms),
        "steps": len(step_ms),
    }


def rates(model: ModelConfig, seq_len: int, tokens_per_step: int, ranks: int, step_ms: float, ceiling_tflops: float) -> dict[str, float]:
    """Tokens and model FLOPs a second of each rank (conventions: planning/flops.py), and the share of a matmul's rate."""
    tokens = tokens_per_step / ranks / step_ms * 1e3
    causal, full = (flops_per_token(model, seq_len, causal=kind) * tokens / 1e12 for kind in (True, False))
    return {
        "tokens_per_second_per_gpu": tokens,
        "tflops_per_gpu_causal": causal,
        "tflops_per_gpu_full": full,
        "share_of_matmul_causal": causal / ceiling_tflops,
    }


def split(totals: dict[str, float], step_ms: Sequence[float]) -> dict[str, float]:
    """Milliseconds of a mean step by part; they add up to it. totals: over all these steps; data is read inside the forward pass."""
    steps = len(step_ms)
    parts = {name: totals.get(name, 0.0) / steps for name in PARTS}
    parts["forward"] -= parts["data"]
    return {**parts, "other": statistics.fmean(step_ms) - sum(parts.values())}


def ratio(ours: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Our speed over another side's, from the step times of each round: above 1, ours is faster.

    lower_bound: of the median, at 95 % (a sign test: the order statistic of the rounds' ratios); None with fewer rounds than that needs, five.
    """
    found = sorted(statistics.fmean(b) / statistics.fmean(a) for a, b in zip(ours, other, strict=True))
    place = _lower_order(len(found))
    return {
        "median": statistics.median(found),
        "lower_bound": None if place is None else found[place],
        "min": found[0],
        "max": found[-1],
        "rounds": len(found),
    }


def _lower_order(count: int) -> int | None:
    """Which of so many sorted values lies below the median of their distribution with 95 % certainty."""
    below, place = 0.0, None
    for number in range(count):
        below += math.comb(count, number) / 2**count
        if below > 1 - CONFIDENCE:
            break
        place = number
    return place
