"""CKA at a published model's true shape, weights random and nothing on disk: seconds of the hidden states of two models, and of the figures.

    python tests/benchmarks/cka.py --device cuda --model llama-3.1-8b [--inputs 200 --tokens 512 --sets 1 --batch-tokens 16384]
    python tests/benchmarks/cka.py --device cpu --model llama-3.1-8b --layers 2 --hidden 64 --inputs 20 --tokens 32         # to try it

Lengths are spread evenly from an eighth of --tokens to all of it. The second model is the first with 1 % of noise on every weight. The first forward
pass (kernels are chosen and compiled in it) is inside what is timed, as it is in `prism cka`; reading weights from disk is not.
"""

import argparse
import json
import time
from dataclasses import replace

import numpy as np
import torch

from megatron_prism import families
from megatron_prism.analysis import cka
from megatron_prism.config import ParallelConfig
from megatron_prism.engine import device, parallel
from megatron_prism.engine.hidden_states import EngineStates, num_points
from megatron_prism.families.model_config import ModelConfig
from megatron_prism.planning.layout import make_plan

NOISE = 0.01


def main() -> None:
    """Build, look, change, look again, compare, print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b", choices=families.PUBLISHED)
    parser.add_argument("--layers", type=int, help="the first so many (of a dense model)")
    parser.add_argument("--hidden", type=int, help="another width, to try the script")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--precision", choices=["fp32", "bf16"])
    for name, default in (("inputs", 200), ("tokens", 512), ("sets", 1), ("batch-tokens", 16_384), ("draws", 20), ("size", 100)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    place, clock = device.setup(options.device), Clock()
    parallel.start(place)
    shape = cut(options)
    precision = options.precision or ("bf16" if place.type == "cuda" else "fp32")
    model = EngineStates(shape, make_plan(shape, ParallelConfig(), 1, seq_len=1, global_batch=1, micro_batch=1), precision, place)
    clock.lap("build_seconds")
    sets = [inputs(options, shape.vocab_size, seed) for seed in range(options.sets)]
    one = [model.pooled(ids, options.batch_tokens, lambda count: None) for ids in sets]
    clock.lap("first_model_seconds")
    with torch.no_grad():
        for weight in model.chunk.parameters():
            weight.add_(torch.randn_like(weight) * weight.std(correction=0), alpha=NOISE)
    clock.lap("noise_seconds")
    other = [model.pooled(ids, options.batch_tokens, lambda count: None) for ids in sets]
    clock.lap("second_model_seconds")
    least = [figures(x.numpy(), y.numpy(), options) for x, y in zip(one, other, strict=True) if x is not None and y is not None]
    clock.lap("figures_seconds")
    tokens = sum(len(row) for ids in sets for row in ids)
    memory = torch.cuda.max_memory_allocated() / 2**30 if place.type == "cuda" else None
    facts = {"model": options.model, "points": num_points(shape), "inputs": options.inputs, "sets": options.sets, "tokens": tokens}
    total = sum(clock.laps[f"{name}_seconds"] for name in ("first_model", "second_model", "figures"))
    print(json.dumps({**facts, "device": str(place), "precision": precision, **clock.laps, "states_and_figures_seconds": round(total, 2),
                      "peak_gib": memory, "least_cka": least}))  # fmt: skip
    parallel.stop()


class Clock:
    """Laps, the device's work included."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End one."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.laps[name], self.last = round(now - self.last, 2), now


def cut(options: argparse.Namespace) -> ModelConfig:
    """The published shape, smaller where asked for."""
    config = families.published(options.model)
    shape = families.find(config).model_config(config)
    if options.layers:
        pattern = shape.hybrid_layer_pattern and shape.hybrid_layer_pattern[: options.layers]
        shape = replace(shape, num_layers=options.layers, hybrid_layer_pattern=pattern)
    return replace(shape, hidden_size=options.hidden, ffn_hidden_size=2 * options.hidden) if options.hidden else shape


def inputs(options: argparse.Namespace, vocab_size: int, seed: int) -> list[list[int]]:
    """Random ids."""
    generator = np.random.default_rng(seed)
    lengths = np.linspace(max(1, options.tokens // 8), options.tokens, options.inputs).astype(int)
    return [generator.integers(0, vocab_size, length).tolist() for length in lengths]


def figures(one: np.ndarray, other: np.ndarray, options: argparse.Namespace) -> float:
    """Every layer's, and the bootstrap; the least mean."""
    draws = cka.draw(options.inputs, min(options.size, options.inputs // 2), options.draws, seed=1234)
    found = [cka.compare(cka.layer(x), cka.layer(y), draws) for x, y in zip(one, other, strict=True)]
    return min(float(alike.draws.mean()) for alike in found if alike is not None)


if __name__ == "__main__":
    main()
