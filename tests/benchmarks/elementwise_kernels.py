"""What one pass over memory costs: kernels that move numbers and hardly compute, beside torch's copy of as many bytes, in turns.

    python tests/benchmarks/elementwise_kernels.py [--count 117440512] [--device cuda] [--rounds 15]

count: numbers in a weight (28,672 x 4,096: fc1 of LLaMA-3.1-8B). Bytes are those that must be read and written once.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch

from megatron_prism.kernels.adamw import Hyperparameters, adamw
from megatron_prism.kernels.bit_sum import bit_sum
from megatron_prism.kernels.fp8_cast import fp8_cast, largest

REPEATS = 5
"""calls between two looks at the clock"""


def main() -> None:
    """A line each: milliseconds, bytes a second, share of the copy's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=28672 * 4096)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    works = passes(options.count, torch.device(options.device))
    for work, _ in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(options.rounds):
        for name, (work, _) in works.items():
            times[name].append(seconds(work, options.device))
    copied = works["copy"][1] / median(times["copy"])
    for name, (_, moved) in works.items():
        rate = moved / median(times[name])
        print(f"{name:24s} {median(times[name]) * 1e3:8.3f} ms  {rate / 1e12:6.3f} TB/s  {rate / copied:.2f} of the copy's")


def passes(count: int, device: torch.device) -> dict[str, tuple[Callable[[], object], int]]:
    """Name -> (work, bytes)."""
    master, gradient, first, second = (torch.randn(count, device=device) for _ in range(4))
    second.abs_()
    weight, target = master.bfloat16(), torch.empty_like(master)
    data, scale = torch.empty(count, dtype=torch.uint8, device=device), torch.tensor(64.0, device=device)
    settings = Hyperparameters(lr=0.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, step=10)
    integers = weight.view(torch.int16)
    return {
        "copy": (lambda: target.copy_(master), 8 * count),
        "adamw": (lambda: adamw(weight, gradient, first, second, settings, master=master), 30 * count),
        "fp8_cast": (lambda: fp8_cast(master, scale, data), 5 * count),
        "fp8_cast's largest": (lambda: largest([master]), 4 * count),
        "bit_sum, 1 byte": (lambda: bit_sum([data]), count),
        "bit_sum, 2 bytes": (lambda: bit_sum([weight]), 2 * count),
        "bit_sum, 4 bytes": (lambda: bit_sum([master]), 4 * count),
        "torch's sum, 2 bytes": (lambda: integers.sum(dtype=torch.int64), 2 * count),
    }


def seconds(work: Callable[[], object], device: str) -> float:
    """Of one call, on average over a few."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    for _ in range(REPEATS):
        work()
    wait()
    return (time.perf_counter() - began) / REPEATS


if __name__ == "__main__":
    main()
