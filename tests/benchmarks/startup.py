"""How soon the command line answers: `python tests/benchmarks/startup.py [--rounds 11]`. Wall time of whole processes, medians."""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    """Time help, an unknown key, an impossible layout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "train.toml"
        recipe.write_text('output = "run"\nsteps = 1\nglobal_batch = 1\n[model]\ncheckpoint = "x"\n[data]\nblend = "y"\nseq_len = 8\n')
        for name, arguments, status in (
            ("prism --help", ["--help"], 0),
            ("prism train --help", ["train", "--help"], 0),
            ("an unknown key", ["train", str(recipe), "optimizer.lrr=1"], 2),
            ("a missing checkpoint", ["train", str(recipe)], 2),
        ):
            times = [seconds([sys.executable, "-m", "megatron_prism", *arguments], status) for _ in range(rounds)]
            print(f"{name:<22} {statistics.median(times):.2f} s  ({min(times):.2f} to {max(times):.2f})")


def seconds(command: list[str], status: int) -> float:
    """Wall time of one process, which must end with a status."""
    begun = time.perf_counter()
    found = subprocess.run(command, capture_output=True, check=False)
    assert found.returncode == status, found.stderr.decode()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
