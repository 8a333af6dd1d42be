"""How fast an import is against copying the same bytes: `python tests/benchmarks/convert.py [--gb 1.0] [--rounds 5] [--folder DIR]`.

A random bf16 LLaMA is written once; then, in turn, `cp` of its shards followed by fsync, and `import_hf` (which also ends with fsync). Both read from
a warm page cache. Prints each round and the medians. Target: the import runs at no less than half the copy's rate.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from megatron_prism import families
from megatron_prism.artifact import write_atomic
from megatron_prism.engine import hf, weights

SIZES = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
"""the shapes of Llama-3.2-1B; the number of layers follows --gb"""


def write_model(folder: Path, gigabytes: float) -> int:
    """A folder of about that size; returns the bytes of its weights."""
    import json

    config = {"model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": True, "torch_dtype": "bfloat16", **SIZES, "num_hidden_layers": 1}
    family = families.find(config)
    per_layer = family.num_parameters(family.model_config({**config, "num_hidden_layers": 2})) - family.num_parameters(family.model_config(config))
    embedding = family.num_parameters(family.model_config(config)) - per_layer
    config["num_hidden_layers"] = max(1, round((gigabytes * 1e9 / 2 - embedding) / per_layer))
    model = family.model_config(config)
    folder.mkdir()
    write_atomic(folder / "config.json", json.dumps(config))
    names = [
        hf.Planned(part.name.replace("{i}", str(entry.layer)), part.shape, torch.bfloat16)
        for entry in family.rules(model)
        for part in entry.rule.parts(model)
    ]
    generator = torch.Generator().manual_seed(0)
    hf.write_weights(folder, names, ((item.name, torch.randn(item.shape, generator=generator)) for item in names), max_shard_bytes=500_000_000)
    return sum(item.nbytes for item in names)


def copy(source: Path, target: Path) -> float:
    """Seconds to copy the shards and have them on disk."""
    started = time.perf_counter()
    target.mkdir()
    for file in sorted(source.glob("*.safetensors")):
        subprocess.run(["cp", str(file), str(target)], check=True)
    for file in target.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - started


def convert(source: Path, target: Path, tp: int) -> float:
    """Seconds to import into one process's files."""
    started = time.perf_counter()
    weights.import_hf(source, target, tp=tp)
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=1.0, help="size of the model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="disk to measure; default: the temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        source, target = Path(scratch) / "hf", Path(scratch) / "out"
        size = write_model(source, arguments.gb)
        seconds: dict[str, list[float]] = {"cp + fsync": [], "import tp=1": [], "import tp=4": []}
        for _ in range(arguments.rounds):
            for name, run in (("cp + fsync", copy), ("import tp=1", lambda a, b: convert(a, b, 1)), ("import tp=4", lambda a, b: convert(a, b, 4))):
                shutil.rmtree(target, ignore_errors=True)
                os.sync()
                seconds[name].append(run(source, target))
        base = statistics.median(seconds["cp + fsync"])
        print(f"{size / 1e9:.2f} GB of bf16 weights, {arguments.rounds} rounds, medians:")
        for name, each in seconds.items():
            middle = statistics.median(each)
            times = " ".join(f"{value:.2f}" for value in each)
            print(f"{name:<12} {middle:6.2f} s  {size / middle / 1e6:7.0f} MB/s  {base / middle:5.2f} of the copy's rate   ({times})")


if __name__ == "__main__":
    main()
