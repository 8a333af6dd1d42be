"""How long packing takes and how full the buffers get: `python tests/benchmarks/packing.py [--documents 1000000] [--runs 3] [--window N]`.
No files, one core. --window: packed N documents at a time, as training does, in place of all together.

    long      log-normal around 16k tokens (sigma 1), none under 4k, buffers of 128k, longer documents split: the paper's long stage in kind
    ordinary  log-normal around 800 tokens (sigma 1.2), buffers of 8k, longer documents split
    spread    every length up to 128k equally likely, buffers of 128k: as many distinct lengths as there can be
    padded    `long` with every document padded to a multiple of 16

Seconds are medians over the runs, of the clock and of this process's core; where other work shares the cores compare the second. Each case runs in
a process of its own; "memory" is the highest the process ever held beyond the lengths.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import numpy as np

from megatron_prism.data_prep.packing import PackingOptions, WindowedPacking

LONG, ORDINARY = 131_072, 8_192


def log_normal(count: int, median: float, sigma: float, at_least: int) -> np.ndarray:
    """Lengths of documents, those under `at_least` drawn again."""
    generator = np.random.default_rng(7)
    lengths = np.zeros(0, np.int32)
    while len(lengths) < count:
        drawn = np.minimum(np.exp(generator.normal(np.log(median), sigma, count)), 1 << 30).astype(np.int32)
        lengths = np.concatenate([lengths, drawn[drawn >= at_least]])
    return lengths[:count]


CASES = {
    "long": (lambda count: log_normal(count, 16_384, 1.0, 4_096), PackingOptions(LONG, over_length="split")),
    "ordinary": (lambda count: log_normal(count, 800, 1.2, 1), PackingOptions(ORDINARY, over_length="split")),
    "spread": (lambda count: np.random.default_rng(7).integers(1, LONG + 1, count, np.int32), PackingOptions(LONG)),
    "padded": (lambda count: log_normal(count, 16_384, 1.0, 4_096), PackingOptions(LONG, 16, over_length="split")),
}


def main() -> None:
    """Measure each case in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--window", type=int, help="documents packed together")
    parser.add_argument("--case", choices=sorted(CASES), help="this one alone, as JSON")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.case, arguments.documents, arguments.runs, arguments.window or arguments.documents)))
        return
    print(f"{arguments.documents} documents\n{'':<10} clock s   core s  distinct    buffers  over bound     fill  memory MB")
    for case in CASES:
        command = [sys.executable, __file__, "--case", case, "--documents", str(arguments.documents), "--runs", str(arguments.runs)]
        command += ["--window", str(arguments.window)] if arguments.window else []
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        times = f"{found['clock']:>7.2f}  {found['core']:>7.2f}"
        print(
            f"{case:<10} {times}  {found['distinct']:>8}  {found['buffers']:>9}  {found['over']:>9.4%}  {found['fill']:.5f}  {found['megabytes']:>9}"
        )


def measure(case: str, count: int, runs: int, window: int) -> dict[str, float]:
    """Pack `runs` times; what the last one gave (distinct lengths: of the last window)."""
    make, options = CASES[case]
    lengths = make(count)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    clocks, cores, tokens, buffers = [], [], 0, 0
    windows = WindowedPacking(lengths, options, window)
    for _ in range(runs):
        clock, core = time.perf_counter(), time.process_time()
        tokens = buffers = 0
        for number in range(windows.num_windows):
            packing = windows.packing(number)
            tokens, buffers = tokens + packing.num_tokens, buffers + packing.num_buffers
        clocks.append(time.perf_counter() - clock)
        cores.append(time.process_time() - core)
    return {
        "clock": statistics.median(clocks),
        "core": statistics.median(cores),
        "distinct": len(np.unique(packing.length)),
        "buffers": buffers,
        "over": buffers / -(-tokens // options.seq_len) - 1,
        "fill": tokens / (buffers * options.seq_len),
        "megabytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024,
    }


if __name__ == "__main__":
    main()
