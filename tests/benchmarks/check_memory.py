"""What `check_memory` costs a step: our training step with it and without it, both in memory, in turns.

    python tests/benchmarks/check_memory.py [--model llama-3.1-8b:8] [--vocab 32000] [--seq 8192] [--device cuda] [--rounds 11] [--steps 2]

Predicted: the time of reading every weight, master weight and moment twice (14 bytes a weight with fp32 states).
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from megatron_prism.engine.bench.cases import Case, Config, resolve


def main() -> None:
    """Print the median steps, their difference, and what it would be at the rate that a copy reaches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b:8")
    for name, default in (("vocab", 32000), ("seq", 8192), ("rounds", 11), ("steps", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plain, checked = prepare(options, Path(folder))
        measure(plain, checked)


def prepare(options: argparse.Namespace, folder: Path) -> list[Case]:
    """The case without the check, and with it."""
    train: dict[str, Any] = {"data": {"seq_len": options.seq}, "device": options.device}
    shared = {"model": options.model, "vocab_size": options.vocab, "rounds": options.rounds, "steps": options.rounds * options.steps, "warmup": 3}
    cases = [{"name": name, "train": {**train, "check_memory": name == "with"}} for name in ("without", "with")]
    return resolve(Config(output=Path("unset"), cases=cases, **shared), 1, folder / "cases")


def measure(plain: Case, checked: Case) -> None:
    """Both sides, in turns."""
    from megatron_prism.engine import device, parallel
    from megatron_prism.engine.bench import figures
    from megatron_prism.engine.bench.measure import Bench
    from megatron_prism.engine.bench.sides import Ours

    place = device.setup(plain.train.device)
    parallel.start(place)
    bench, mesh = Bench(place), parallel.build_mesh(plain.plan, plain.train.seed)
    sides = [bench.open(case.name, lambda case=case: Ours(case, mesh, place), case.options.warmup) for case in (plain, checked)]
    bench.turns([(side.side, side.timing) for side in sides], plain)
    without, with_it = (figures.summary([step for turn in side.timing.rounds for step in turn]) for side in sides)
    found = figures.ratio(sides[0].timing.rounds, sides[1].timing.rounds)
    weights = sides[0].side.parameters()
    print(
        f"{plain.options.model}, {weights:,} weights: step {without['median']:.1f} ms ({without['min']:.1f} to {without['max']:.1f}) without, "
        f"{with_it['median']:.1f} ms ({with_it['min']:.1f} to {with_it['max']:.1f}) with check_memory: {found['median'] - 1:+.1%} "
        f"({found['min'] - 1:+.1%} to {found['max'] - 1:+.1%} over {found['rounds']} rounds); "
        f"{2 * 14 * weights / (with_it['median'] - without['median']) / 1e9:.2f} TB/s for 14 bytes a weight, read twice"
    )
    for side in sides:
        side.side.close()
    parallel.stop()


if __name__ == "__main__":
    main()
