"""One process on a CPU: our training step beside a bare loop over the same GPTModel (torch AdamW, no DDP, no distributed optimizer).

    python tests/benchmarks/train_cpu.py [--rounds 9] [--steps 4] [--threads 2]

Each round times both, one after the other in alternating order, on the same samples; printed are the medians of their tokens per second and of the
ratio within each round. Reading the samples, the learning rate, the reduction of the report and reading the loss count on both sides.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SEQ_LEN, GLOBAL_BATCH, MICRO_BATCH, VOCAB = 256, 16, 4, 2048


def main() -> None:
    """Build both, measure, print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--steps", type=int, default=4, help="steps of each side in a round")
    arguments.add_argument("--threads", type=int, default=2)
    options = arguments.parse_args()

    import torch

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        ours, bare, parameters = build_both(Path(folder))
        rates = measure(ours, bare, options.rounds, options.steps)
    ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates["bare"], strict=True))
    print(f"{parameters:,} parameters, fp32, {GLOBAL_BATCH} sequences of {SEQ_LEN} a step, {MICRO_BATCH} at a time, {options.threads} threads")
    print(f"torch {torch.__version__}, megatron-core {metadata.version('megatron-core')}; {options.rounds} rounds of {options.steps} steps, medians")
    for name, found in rates.items():
        print(f"{name:<5} {statistics.median(found):8,.0f} tokens/s  ({min(found):,.0f} to {max(found):,.0f})")
    print(f"ours / bare = {ratio:.3f}")


def build_both(folder: Path) -> tuple[Callable[[int], float], Callable[[int], float], int]:
    """Two functions that take one step on the global batch that starts at a sample, and return its loss; and the number of weights."""
    import torch
    from tiny_blend import write_tiny_blend

    from megatron_prism.config import ParallelConfig
    from megatron_prism.data_prep.blend import load_blend
    from megatron_prism.engine import device, parallel
    from megatron_prism.engine.data import SampleReader
    from megatron_prism.engine.model import BuildOptions, build
    from megatron_prism.engine.optimizer import build_optimizer, wrap_model
    from megatron_prism.engine.step import Engine, train_step
    from megatron_prism.families.model_config import ModelConfig
    from megatron_prism.planning import cost
    from megatron_prism.planning.layout import make_plan

    model = ModelConfig(
        family="llama", num_layers=4, hidden_size=128, ffn_hidden_size=352, num_attention_heads=4, num_query_groups=2, kv_channels=32,
        vocab_size=VOCAB, max_position_embeddings=SEQ_LEN, layernorm_epsilon=1e-5, rotary_base=1e4, share_embeddings_and_output_weights=True,
    )  # fmt: skip
    place = device.setup("cpu")
    parallel.start(place)
    mesh = parallel.build_mesh(make_plan(model, ParallelConfig(), 1, SEQ_LEN, GLOBAL_BATCH, MICRO_BATCH), seed=1)
    data = SampleReader(load_blend(write_tiny_blend(folder / "data", VOCAB)), "train", SEQ_LEN, mask_end_of_document=False)
    from megatron_prism.config import OptimizerConfig

    wrapped = wrap_model(build(model, mesh, BuildOptions(), place), mesh, OptimizerConfig(), overlap=False)
    engine = Engine(wrapped, build_optimizer(wrapped, OptimizerConfig(lr=1e-3), mesh, bf16=False), mesh, place)

    (plain,) = build(model, mesh, BuildOptions(), place)
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)

    def bare_step(first_sample: int) -> float:
        adamw.zero_grad()
        total = 0.0
        for batch in data.step(first_sample, mesh, place):
            loss = plain(batch.tokens, batch.positions, None, labels=batch.labels).mean() * MICRO_BATCH / GLOBAL_BATCH
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        adamw.step()
        return total

    return lambda first: train_step(engine, data, first, 1e-3, 0.1).loss, bare_step, cost.num_parameters(model)


def measure(ours: Callable[[int], float], bare: Callable[[int], float], rounds: int, steps: int) -> dict[str, list[float]]:
    """Tokens per second of each side in each round, after a warm-up round."""
    sides = {"ours": ours, "bare": bare}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in sorted(sides, reverse=bool(number % 2)):
            begun = time.perf_counter()
            for step in range(steps):
                sides[name]((number * steps + step) * GLOBAL_BATCH)
            if number:
                rates[name].append(steps * GLOBAL_BATCH * SEQ_LEN / (time.perf_counter() - begun))
    return rates


if __name__ == "__main__":
    main()
