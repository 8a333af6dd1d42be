"""Our training stage on GPUs over random tokens, and its metrics: tokens per second, TFLOP/s (causal), memory.

    torchrun --nproc-per-node N tests/benchmarks/train_gpu.py [--model NAME:LAYERS ...] [--seq 8192] [--steps 16] [key.sub=value ...]

The model is the first layers of a published one (`prism plan` names them), by default LLaMA-3.1-8B's, its vocabulary cut to 32,000 unless told
otherwise (0: its own), with random weights.
The figure is the median of the steps after the first five. A step is everything: reading samples, forward, backward, reduction, clipping, AdamW,
reading the loss.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    """Train each model in turn, print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("seq", 8192), ("steps", 16), ("vocab", 32000), ("batch", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", nargs="+", default=["llama-3.1-8b:8"], help="NAME:LAYERS")
    options, overrides = parser.parse_known_args()
    root = Path(os.environ.get("BENCH_ROOT") or tempfile.mkdtemp())
    for model in options.model:
        name, _, layers = model.partition(":")
        train(root / model.replace(":", "_"), name, int(layers), options, [word for word in overrides if "=" in word])


def train(root: Path, name: str, layers: int, options: argparse.Namespace, overrides: list[str]) -> None:
    """Write a model config and random shards, train, print a line."""
    import torch

    from megatron_prism import families
    from megatron_prism.config import load_recipe
    from megatron_prism.engine import loop
    from megatron_prism.engine.recipe import TrainConfig

    config = first_layers(families.published(name), layers)
    config["vocab_size"] = options.vocab or config["vocab_size"]
    if os.environ.get("LOCAL_RANK", "0") == "0":
        write_inputs(root, config, options.seq)
        (root / "ready").touch()
    while not (root / "ready").exists():
        pass
    world = int(os.environ.get("WORLD_SIZE", "1"))
    values = [
        f"output={root}/run", f"model.hf_config={root}/model", f"model.tokenizer={root}/model", f"data.blend={root}/data/blend.toml",
        f"data.seq_len={options.seq}", f"steps={options.steps}", f"global_batch={options.batch or world}", "log.interval=1", "optimizer.lr=1e-4",
    ]  # fmt: skip
    run = loop.build_run(load_recipe(None, [*values, *overrides], TrainConfig))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    for _ in range(options.steps):
        loop._log(run, loop._step(run))
    if run.is_main:
        report(root / "run" / "metrics.jsonl", [name, f"{layers} layers", *overrides])
    del run
    gc.collect()
    torch.cuda.empty_cache()


def first_layers(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """A config.json with fewer layers; lists and patterns with an entry for each layer are cut too."""
    whole = config["num_hidden_layers"]
    cut = {key: value[:layers] for key, value in config.items() if isinstance(value, list | str) and len(value) == whole}
    return {**config, **cut, "num_hidden_layers": layers}


def write_inputs(root: Path, config: dict[str, Any], seq: int) -> None:
    """config.json and one source of random tokens."""
    import numpy as np
    from tiny_blend import write_source

    from megatron_prism.data_prep.blend import Blend, BlendSource, write_blend

    (root / "model").mkdir(parents=True)
    (root / "model" / "config.json").write_text(json.dumps(config))
    (root / "model" / "tokenizer.json").write_text("{}")
    tokens = np.random.default_rng(0).integers(1, config["vocab_size"], (64, seq))
    write_source(root / "data", "random", "train", [row.tolist() for row in tokens], config["vocab_size"])
    write_blend(root / "data" / "blend.toml", Blend(1, (BlendSource("random", "random", 1.0, root / "data" / "random" / "train"),)))


def report(path: Path, names: list[str]) -> None:
    """Median, fastest and slowest step after the first five."""
    lines = [json.loads(line) for line in path.read_text().splitlines()][5:]
    keys = ("seconds_per_step", "tokens_per_second", "tflops_per_rank", "memory_gib", "data_wait_seconds")
    found = {key: [line[key] for line in lines] for key in keys}
    middle = {key: statistics.median(values) for key, values in found.items()}
    print(
        f"{' '.join(names)}: step {1e3 * middle['seconds_per_step']:.1f} ms ({1e3 * min(found['seconds_per_step']):.1f} to "
        f"{1e3 * max(found['seconds_per_step']):.1f}), {middle['tokens_per_second']:,.0f} tokens/s, {middle['tflops_per_rank']:.1f} TFLOP/s per GPU "
        f"(causal, no recompute counted), {middle['memory_gib']:.1f} GiB, waits {1e3 * middle['data_wait_seconds']:.2f} ms for data, "
        f"loss {lines[0]['loss']:.3f} to {lines[-1]['loss']:.3f}"
    )


if __name__ == "__main__":
    main()
