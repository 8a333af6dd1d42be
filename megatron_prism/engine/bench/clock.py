"""Time on a device: marks, spans of named work, the matmul rate that a share is taken of.

On CUDA a mark is an event on the current stream, read once everything is done: timing adds no synchronisation to what it times. On the CPU, where
calls return when their work is done, it is the clock of the process.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

CUBE = {"cuda": 8192, "cpu": 512}
MATMUL_WARMUP, MATMULS = {"cuda": 200, "cpu": 5}, 20
"""products before the clock starts: a GPU that has waited for the host is slow at first (702 to 792 TFLOP/s on an H200; after work 787 to 791)"""
SPANS = {"forward-compute": "forward", "backward-compute": "backward", "micro-batch": "graph"}
"""hooks of megatron-core's schedule, and of ours with CUDA graphs -> our spans; there are more, which are left alone"""


def mark(device: torch.device) -> Any:
    """Now, on the device's time line."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(begin: Any, end: Any) -> float:
    """Between two marks. On CUDA: after `synchronize`."""
    return 1e3 * (end - begin) if isinstance(begin, float) else float(begin.elapsed_time(end))


def synchronize(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()


class Span:
    """One kind of work: started and stopped any number of times."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.marks = device, list[Any]()

    def start(self, barrier: bool = False) -> None:
        """Begin. barrier: megatron-core's, which would change what is measured, is not taken up."""
        self.marks.append(mark(self.device))

    def stop(self, barrier: bool = False) -> None:
        """End."""
        self.marks.append(mark(self.device))

    def read(self) -> float:
        """Milliseconds since the last reading."""
        marks, self.marks = self.marks, []
        return sum(milliseconds(begin, end) for begin, end in zip(marks[::2], marks[1::2], strict=True))


class _Nothing(Span):
    def start(self, barrier: bool = False) -> None: ...
    def stop(self, barrier: bool = False) -> None: ...


class Timeline:
    """Spans by name. A call of it is what megatron-core expects of `config.timers`."""

    def __init__(self, device: torch.device) -> None:
        self.spans: defaultdict[str, Span] = defaultdict(lambda: Span(device))
        self.nothing = _Nothing(device)

    def __call__(self, name: str, log_level: int = 0) -> Span:
        return self.spans[SPANS[name]] if name in SPANS else self.nothing

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time what runs inside."""
        self.spans[name].start()
        yield
        self.spans[name].stop()

    def read(self) -> dict[str, float]:
        """Milliseconds of each span since the last reading. On CUDA: after `synchronize`."""
        return {name: span.read() for name, span in self.spans.items()}


def matmul_tflops(device: torch.device) -> tuple[float, str]:
    """The rate of one large matrix product of random numbers, median, in TFLOP/s; and what was multiplied."""
    size = CUBE[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    marks, warmup = [], MATMUL_WARMUP[device.type]
    for number in range(warmup + MATMULS + 1):
        if number >= warmup:
            marks.append(mark(device))
        torch.mm(a, b, out=out)
    synchronize(device)
    times = [milliseconds(begin, end) for begin, end in pairwise(marks)]
    return 2 * size**3 / statistics.median(times) / 1e9, f"torch.mm, {size} cube, {str(dtype).removeprefix('torch.')}, random normal"
