"""What it costs that every step is looked at for NaN and infinity, on a CPU: steps with and without it, in turn, in one process.

    python tests/benchmarks/bad_steps.py [--rounds 15] [--steps 4]

Printed: the least CPU seconds a step of any round (a busy machine only adds to them), their ratio, and those of a replay.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    """Build, measure, print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--steps", type=int, default=4, help="steps of each side in a round")
    options = arguments.parse_args()
    import torch
    from training import from_random, recipe

    from megatron_prism.config import load_recipe
    from megatron_prism.engine import loop, origin
    from megatron_prism.engine.recipe import TrainConfig
    from megatron_prism.engine.step import forward_backward, train_step

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = from_random(root, hidden_size=256, intermediate_size=1024, num_hidden_layers=4)
        run = loop.build_run(load_recipe(None, recipe(root, root / "run", **model, global_batch=4, data__seq_len=64), TrainConfig))

        def step() -> None:
            train_step(run.engine, run.data, 0, 1e-3, 0.1)

        def unwatched() -> None:
            with mock.patch.object(type(run.engine.optimizer), "step", plain_step):
                step()

        found = measure({"looked at": step, "not": unwatched}, options.rounds, options.steps)
        begun = time.process_time()
        origin.find(run.engine, lambda: forward_backward(run.engine, run.data, 0, forward_only=False))
        replay = time.process_time() - begun
        run.close()
    ratio = min(found["looked at"]) / min(found["not"])
    for name, seconds in found.items():
        print(f"{name:<10} {1e3 * min(seconds):8.2f} ms of CPU a step (median {1e3 * statistics.median(seconds):.2f})")
    print(f"ratio {ratio:.4f}; a replay {1e3 * replay:.0f} ms; torch {torch.__version__}, 1 thread, {options.rounds} rounds of {options.steps} steps")


def plain_step(optimizer: Any, losses: Any) -> Any:
    """The step as it was before anything was looked at: the norm alone, and an update whatever it is."""
    import torch
    import torch.distributed as dist

    with torch.no_grad():
        for part in optimizer.chained_optimizers:
            part.prepare_grads()
        total = torch.zeros((), dtype=torch.float32)
        for part in optimizer.chained_optimizers:
            total += torch.stack(torch._foreach_norm(part.get_main_grads_for_grad_norm(), 2, dtype=torch.float32)).square().sum()
        dist.all_reduce(total)
        mean = optimizer._mean()
        norm = total.sqrt() * mean
        scale = mean * (optimizer.clip_grad / (norm + 1e-6)).clamp(max=1.0)
        for part in optimizer.chained_optimizers:
            part.optimizer.gradient_scale = scale
            part.step_with_ready_grads()
    return norm, torch.ones((), dtype=torch.bool)


def measure(sides: dict[str, Callable[[], None]], rounds: int, steps: int) -> dict[str, list[float]]:
    """CPU seconds a step of each side, by round; the sides take turns in going first."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            begun = time.process_time()
            for _ in range(steps):
                sides[name]()
            if number:  # the first round warms up
                found[name].append((time.process_time() - begun) / steps)
    return found


if __name__ == "__main__":
    main()
