"""From times to figures, on numbers whose answers are known."""

import pytest

from megatron_prism import families
from megatron_prism.engine.bench import figures
from megatron_prism.planning.cost import flops_per_token

LLAMA = families.find(families.published("llama-3.1-8b")).model_config(families.published("llama-3.1-8b"))


def test_rates_follow_the_flops_of_planning():
    """Two ranks, 4 sequences of 1,000 tokens in 2 s: 1,000 tokens/s on each."""
    found = figures.rates(LLAMA, 1000, tokens_per_step=4000, ranks=2, step_ms=2000.0, ceiling_tflops=100.0)
    causal, full = (flops_per_token(LLAMA, 1000, causal) for causal in (True, False))
    assert found["tokens_per_second_per_gpu"] == pytest.approx(1000)
    assert found["tflops_per_gpu_causal"] == pytest.approx(causal * 1000 / 1e12)
    assert found["tflops_per_gpu_full"] == pytest.approx(full * 1000 / 1e12)
    assert found["share_of_matmul_causal"] == pytest.approx(causal / 1e9 / 100)


def test_the_published_baseline_row_is_reproduced():
    """8 layers of LLaMA-3.1-8B, vocabulary 32,000, 8,192 tokens in 205.9 ms: 39,778 tokens/s and 511.8 TFLOP/s of docs/benchmarks.md's loop."""
    config = families.published("llama-3.1-8b") | {"num_hidden_layers": 8, "vocab_size": 32000}
    found = figures.rates(families.find(config).model_config(config), 8192, 8192, ranks=1, step_ms=205.93, ceiling_tflops=788.0)
    assert found["tokens_per_second_per_gpu"] == pytest.approx(39778, rel=1e-3)
    assert found["tflops_per_gpu_causal"] == pytest.approx(511.8, rel=1e-3)


def test_the_parts_of_a_step_add_up_to_its_mean():
    found = figures.split({"data": 2.0, "forward": 22.0, "backward": 40.0, "optimizer": 6.0}, [30.0, 50.0])
    parts = {"data": 1.0, "forward": 10.0, "backward": 20.0, "graph": 0.0, "reduction": 0.0, "optimizer": 3.0, "other": 6.0}
    assert found == pytest.approx(parts)
    assert sum(found.values()) == pytest.approx(40.0)


def test_a_ratio_is_the_median_of_the_rounds_and_noise_that_hits_both_sides_leaves_it():
    ours = [[100.0, 100.0], [110.0, 90.0], [300.0, 300.0], [100.0, 100.0], [100.0, 100.0]]
    other = [[120.0, 120.0], [120.0, 120.0], [360.0, 360.0], [110.0, 110.0], [130.0, 130.0]]
    found = figures.ratio(ours, other)
    assert found["median"] == pytest.approx(1.2)
    assert (found["lower_bound"], found["min"], found["max"]) == pytest.approx((1.1, 1.1, 1.3))
    assert found["rounds"] == 5


@pytest.mark.parametrize(("rounds", "place"), [(4, None), (5, 0), (7, 0), (8, 1), (10, 1), (11, 2), (20, 5)])
def test_the_lower_bound_is_that_of_a_sign_test_at_95_percent(rounds: int, place: int | None):
    """The places of textbook tables of the sign test, one-sided."""
    ratios = [1.0 + number / 100 for number in range(rounds)]
    found = figures.ratio([[1.0]] * rounds, [[ratio] for ratio in reversed(ratios)])
    assert found["lower_bound"] == (None if place is None else ratios[place])


def test_a_summary_has_median_and_spread():
    assert figures.summary([3.0, 1.0, 2.0, 10.0]) == {"median": 2.5, "min": 1.0, "max": 10.0, "mean": 4.0, "steps": 4}
