"""Masters that are cut over ranks become the FP8 that the whole weights become: one scale for a weight, wherever its largest value lies.

FP8 weights in a model need a GPU: tests/gpu/test_gpu_fp8_params.py.
"""

from pathlib import Path

import torch

from megatron_prism.kernels.fp8_cast import fp8_cast, largest, scales_of


def test_two_ranks_make_the_fp8_of_whole_weights(tmp_path: Path, run_ranks) -> None:
    torch.manual_seed(0)
    whole = torch.randn(5, 1400) * 10.0 ** torch.arange(-2, 3)[:, None]
    whole[2, 3], whole[3, 1399], whole[4] = 1e4, -1e5, 0.0  # on either rank, and nowhere
    torch.save(whole, tmp_path / "whole.pt")
    run_ranks(Path(__file__).with_name("fp8_weight_ranks.py"), 2, str(tmp_path))
    (first, inverses), (second, others) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    scales, expected_inverses = scales_of(largest(list(whole)))
    expected = torch.zeros(whole.shape, dtype=torch.uint8)
    for master, scale, place in zip(whole, scales, expected, strict=True):
        fp8_cast(master, scale, place)
    assert torch.equal(inverses, expected_inverses) and torch.equal(others, inverses)
    assert torch.equal(first + second, expected), "each wrote its ranges and nothing else"
