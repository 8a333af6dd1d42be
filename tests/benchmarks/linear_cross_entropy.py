"""LM head and loss, forward and backward, on one GPU: ours against torch's product and cross-entropy; chunk sizes; the Triton kernel's roofline.

    python tests/benchmarks/linear_cross_entropy.py [--vocab 32000 49159 128256] [--tokens 8192] [--hidden 4096] [--repeats 10] [--tiny]

TFLOP/s count the three products that are needed (6 * tokens * hidden * vocabulary), whatever a line computes; beside them their share of the rate of
an 8192-cube bf16 product in the same run. Times: CUDA events, median (smallest to largest) of --repeats after three others. Memory: the peak beyond
inputs, weight and main_grad. --tiny runs everything on a CPU in Triton's interpreter: to see that it runs, not how fast.
"""

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable

TINY = "--tiny" in sys.argv
if TINY:
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from megatron_prism.kernels.linear_cross_entropy import head, linear_cross_entropy, products, softmax  # noqa: E402
from megatron_prism.kernels.linear_cross_entropy.vocabulary import Vocabulary  # noqa: E402

DEVICE, DTYPE = ("cpu", torch.float32) if TINY else ("cuda", torch.bfloat16)


def main() -> None:
    """The ceiling, then each vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--vocab", type=int, nargs="+", default=[100] if TINY else [32000, 49159, 128256])
    for name, default, tiny in (("tokens", 8192, 8), ("hidden", 4096, 16), ("repeats", 10, 2), ("ceiling", 8192, 64)):
        parser.add_argument(f"--{name}", type=int, default=tiny if TINY else default)
    parser.add_argument("--chunks", type=int, nargs="+", default=[4, 8] if TINY else [512, 1024, 2048, 4096])
    options = parser.parse_args()
    ceiling = product_rate(options.ceiling, options.repeats)
    device = "cpu" if TINY else torch.cuda.get_device_name()
    print(f"# {device}, torch {torch.__version__}: product of {options.ceiling}-cubes {ceiling:.1f} TFLOP/s", flush=True)
    for vocabulary in options.vocab:
        compare(vocabulary, options, ceiling)
        roofline(vocabulary, options)


def product_rate(side: int, repeats: int) -> float:
    """TFLOP/s of a square product of random numbers."""
    left, right, out = (torch.randn(side, side, device=DEVICE, dtype=DTYPE) for _ in range(3))
    return 2 * side**3 / 1e9 / timed(lambda: torch.mm(left, right, out=out), repeats)[0]


def compare(real: int, options: argparse.Namespace, ceiling: float) -> None:
    """A line for each way; the weight has rows up to a multiple of 128, as Megatron pads."""
    made = inputs(real, options)
    flop = 6 * options.tokens * options.hidden * real

    def line(name: str, step: Callable[[], None]) -> None:
        (middle, least, most), beyond = timed(step, options.repeats), peak(step)
        rate = flop / 1e9 / middle
        spread = f"({least:.2f}-{most:.2f})"
        print(f"v {real:6d}  {name:44s} {middle:8.2f} ms {spread:17s} {rate:7.1f} TFLOP/s {rate / ceiling:6.1%} {beyond:7.3f} GiB", flush=True)

    line("torch: product, cross_entropy", lambda: plain(*made))
    line("promised, unit, main_grad", lambda: ours(*made, unit=True))
    line("promised, main_grad", lambda: ours(*made, unit=False))
    line("per token, main_grad", lambda: ours(*made, promised=False))
    if products._transformer_engine_gemm() is not None and not TINY:
        chosen, products._transformer_engine_gemm = products._transformer_engine_gemm, lambda: None
        line("promised, unit, main_grad, torch's products", lambda: ours(*made, unit=True))
        line("per token, main_grad, torch's products", lambda: ours(*made, promised=False))
        products._transformer_engine_gemm = chosen
    for chunk in options.chunks:
        line(f"promised, unit, main_grad, chunks of {chunk}", lambda chunk=chunk: ours(*made, unit=True, chunk_tokens=chunk))
    usual = head.BLOCK_BYTES
    for mebibytes in (128, 512):
        head.BLOCK_BYTES = mebibytes * 2**20
        line(f"per token, main_grad, blocks of {mebibytes} MiB", lambda: ours(*made, promised=False))
    head.BLOCK_BYTES = usual


Inputs = tuple[torch.Tensor, torch.nn.Parameter, torch.Tensor, torch.Tensor, int]


def inputs(real: int, options: argparse.Namespace) -> Inputs:
    """x, weight with main_grad, labels, token weights, real rows."""
    rows = -(-real // 128) * 128
    x = torch.randn(options.tokens, options.hidden, device=DEVICE, dtype=DTYPE).requires_grad_()
    weight = torch.nn.Parameter((torch.randn(rows, options.hidden, device=DEVICE) / options.hidden**0.5).to(DTYPE))
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(rows, options.hidden, device=DEVICE), False
    labels = torch.randint(real, (options.tokens,), device=DEVICE)
    return x, weight, labels, torch.full((options.tokens,), 1 / options.tokens, device=DEVICE), real


def ours(
    x: torch.Tensor, weight: torch.nn.Parameter, labels: torch.Tensor, weights: torch.Tensor, real: int,
    promised: bool = True, unit: bool = False, chunk_tokens: int | None = None,
) -> None:  # fmt: skip
    """Forward and backward, the weight's gradient into main_grad."""
    x.grad = weight.grad = None
    losses = linear_cross_entropy(
        x, weight, labels, token_weights_t=weights if promised else None, unit_gradient=unit, real_rows=real, chunk_tokens=chunk_tokens, impl="fused"
    )
    (losses * weights).sum().backward()


def plain(x: torch.Tensor, weight: torch.nn.Parameter, labels: torch.Tensor, weights: torch.Tensor, real: int) -> None:
    """Forward and backward, the weight's gradient in its own type."""
    x.grad = weight.grad = None
    losses = F.cross_entropy(torch.mm(x, weight[:real].T), labels, reduction="none")
    (losses * weights).sum().backward()


def roofline(real: int, options: argparse.Namespace) -> None:
    """The Triton kernel alone on a chunk: a read and a write of the logits over the time, beside a copy's; the second read is the L2's to serve."""
    rows = -(-real // 128) * 128
    tokens = min(options.tokens, head.CHUNK_BYTES // (rows * DTYPE.itemsize))
    logits = torch.randn(tokens, rows, device=DEVICE, dtype=DTYPE)
    labels, weights = torch.randint(real, (tokens,), device=DEVICE), torch.ones(tokens, device=DEVICE)
    vocabulary, other = Vocabulary(0, real, 1.0, -100, None), torch.empty_like(logits)
    copy = 2 * logits.nbytes / 1e6 / timed(lambda: other.copy_(logits), options.repeats)[0]
    usual = softmax.LARGEST_BLOCK
    for block in (64,) if TINY else (4096, 8192, 16384, 32768):
        softmax.LARGEST_BLOCK = block
        both = timed(lambda: softmax.statistics_and_gradient(logits, labels, weights, vocabulary), options.repeats)[0]
        one = timed(lambda: softmax.statistics(logits, labels, vocabulary), options.repeats)[0]
        rates = f"{2 * logits.nbytes / 1e6 / both:7.1f} GB/s, copy {copy:.1f}; statistics alone {logits.nbytes / 1e6 / one:.1f} GB/s"
        print(f"v {real:6d}  kernel, {tokens} tokens, blocks of {block:5d}: {both:.3f} ms, {rates}", flush=True)
    softmax.LARGEST_BLOCK = usual


def timed(step: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Milliseconds: median, least, most."""
    for _ in range(3):
        step()
    if TINY:
        found = []
        for _ in range(repeats):
            start = time.perf_counter()
            step()
            found.append(1e3 * (time.perf_counter() - start))
    else:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            step()
            mark.record()
        torch.cuda.synchronize()
        found = [one.elapsed_time(other) for one, other in itertools.pairwise(marks)]
    return statistics.median(found), min(found), max(found)


def peak(step: Callable[[], None]) -> float:
    """GiB beyond what was allocated before; gradients of x and weight are part of it, from the step before too."""
    if TINY:
        return 0.0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


if __name__ == "__main__":
    main()
