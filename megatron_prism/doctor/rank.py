"""One rank of the all-reduce that `prism doctor` tries: `python -m megatron_prism.doctor.rank DEVICE STORE RANKS RANK`.

Rank 0 prints what it measured. Refuses sums that are not exact.
"""

import json
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=60)
ELEMENTS = 1 << 20
TRIES = 5


def main() -> None:
    """Join, sum, compare, tell the time, leave."""
    device_name, store, ranks, rank = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    on_gpus = device_name != "cpu" and torch.cuda.device_count() >= ranks
    if device_name == "cuda" and not on_gpus:
        raise SystemExit(f"{ranks} ranks need {ranks} GPUs, torch sees {torch.cuda.device_count()}; give fewer --ranks, or --device cpu")
    device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    backend = "nccl" if on_gpus else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=TIMEOUT)
    seconds = min(_all_reduce(device, rank, ranks) for _ in range(TRIES))
    skew = min(_clock_difference(device, ranks) for _ in range(TRIES))
    dist.destroy_process_group()
    if rank == 0:
        print(json.dumps({"backend": backend, "seconds": seconds, "clock_seconds": skew}))


def _all_reduce(device: torch.device, rank: int, ranks: int) -> float:
    tensor = torch.full((ELEMENTS,), float(rank + 1), device=device)
    dist.barrier()
    start = time.perf_counter()
    dist.all_reduce(tensor)
    low, high = (float(edge) for edge in torch.aminmax(tensor))
    expected = ranks * (ranks + 1) / 2
    if (low, high) != (expected, expected):
        raise SystemExit(f"the all-reduce gave {low:g} to {high:g}, {expected:g} is right: a link or a driver corrupts data")
    return time.perf_counter() - start


def _clock_difference(device: torch.device, ranks: int) -> float:
    """Seconds between the clocks as ranks leave one barrier: what they differ by, or less, beside the barrier's own time."""
    dist.barrier()
    now = torch.tensor([time.time()], dtype=torch.float64, device=device)
    every: list[Any] = [torch.zeros_like(now) for _ in range(ranks)]
    dist.all_gather(every, now)
    return float(max(every) - min(every))


if __name__ == "__main__":
    main()
