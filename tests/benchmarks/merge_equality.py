"""`prism merge` beside mergekit on the same Hugging Face folders: every element's distance in ulps of fp32, seconds and peak memory of both.

    python tests/benchmarks/merge_equality.py --mergekit VENV/bin/mergekit-yaml [--work DIR] [--layers 24 --hidden 1024]

mergekit lives in an environment of its own (pip install torch==2.13.0 mergekit). Models: random ones of the families that it knows, in fp32 and
bf16, merged by 0.15 and 0.85, by three weights that it divides by their sum, and by slerp; results in fp32. Ours also from checkpoints of other
layouts. Then a larger LLaMA for time and memory. Exit status 1 where linear differs by more than 1 ulp.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from safetensors import safe_open
from tiny_models import write_llama, write_tiny

FAMILIES = ("llama", "mistral", "granite", "granite_hybrid")
CASES: dict[str, tuple[list[float], str]] = {
    "0.15 : 0.85": ([0.15, 0.85], "linear"),
    "1 : 2 : 5": ([1.0, 2.0, 5.0], "linear"),
    "slerp, 0.85": ([0.15, 0.85], "slerp"),
}


def main() -> None:
    """Compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, required=True, help="its mergekit-yaml")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1024)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        worst = max(compare_family(Path(work), options.mergekit, name, dtype) for name in FAMILIES for dtype in (torch.float32, torch.bfloat16))
        clock(Path(work), options)
    sys.exit(worst > 1.0)


def compare_family(work: Path, mergekit: Path, name: str, dtype: torch.dtype) -> float:
    """The largest distance over the linear cases of one family, in ulps."""
    root = work / f"{name}_{str(dtype).removeprefix('torch.')}"
    models = [write_tiny(name, root / f"model{seed}", dtype, seed=seed) for seed in range(3)]
    for number, model in enumerate(models):
        run([sys.executable, "-m", "megatron_prism", "convert", "import", model, root / f"checkpoint{number}", "--tp", 2, "--pp", 2])
    worst = 0.0
    for case, (weights, method) in CASES.items():
        chosen = models[: len(weights)]
        theirs, _, _ = by_mergekit(mergekit, root / f"{method}{len(weights)}", chosen, weights, method)
        ours, _, _ = by_prism(root / f"ours_{method}{len(weights)}", chosen, weights, method)
        mixed, _, _ = by_prism(root / f"mixed_{method}{len(weights)}", [*chosen[:-1], root / f"checkpoint{len(weights) - 1}"], weights, method)
        found, again = distance(ours, theirs), distance(mixed, ours)
        print(f"{root.name:24} {case:12} largest distance to mergekit {found:g} ulp; from a checkpoint {again:g} ulp to that", flush=True)
        worst = max(worst, again, found if method == "linear" else 0.0)
    return worst


def by_mergekit(command: Path, output: Path, models: list[Path], weights: list[float], method: str) -> tuple[Path, float, float]:
    """mergekit's result, seconds and peak memory in MiB."""
    listed: list[dict[str, Any]] = [{"model": str(model)} for model in models]
    content: dict[str, Any] = {"models": listed, "merge_method": method, "dtype": "float32"}
    if method == "linear":
        for entry, weight in zip(listed, weights, strict=True):
            entry["parameters"] = {"weight": weight}
    else:
        content |= {"base_model": str(models[0]), "parameters": {"t": weights[1] / sum(weights)}}
    recipe = output.with_suffix(".yml")
    recipe.write_text(json.dumps(content))  # JSON is YAML
    return (output, *run([command, recipe, output, "--lazy-unpickle"]))


def by_prism(output: Path, models: list[Path], weights: list[float], method: str) -> tuple[Path, float, float]:
    """Our result, seconds and peak memory in MiB."""
    listed = ", ".join(f'{{path = "{model}", weight = {weight}}}' for model, weight in zip(models, weights, strict=True))
    words = [f"models=[{listed}]", f"output={output}", f"method={method}", "format=hf", "dtype=float32", "normalize=true"]
    return (output, *run([sys.executable, "-m", "megatron_prism", "merge", *words]))


def run(command: list[Any]) -> tuple[float, float]:
    """Seconds, and peak memory (resident, in MiB) of a command; its output is shown where it fails."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log, env={**os.environ, "PYTHONSAFEPATH": "1"})
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            log.seek(0)
            raise SystemExit(f"{command} failed:\n{log.read().decode()[-3000:]}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder, widened to fp32 (exactly)."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name).float().numpy() for name in opened.keys()}  # noqa: SIM118 (not a dict)
    return found


def distance(ours: Path, theirs: Path) -> float:
    """The largest difference of one element, in ulps of the larger; a tied LM head stored a second time is no other tensor."""
    left, right = tensors(ours), tensors(theirs)
    extra = (left.keys() ^ right.keys()) - {"lm_head.weight"}
    assert not extra, extra
    worst = 0.0
    for name in left.keys() & right.keys():
        ulp = np.spacing(np.maximum(np.abs(left[name]), np.abs(right[name])))
        worst = max(worst, float((np.abs(left[name].astype(np.float64) - right[name]) / ulp).max()))
    return worst


def clock(work: Path, options: argparse.Namespace) -> None:
    """Seconds and memory of both on a larger LLaMA in bf16, in shards of 100 MB."""
    sizes = {"num_hidden_layers": options.layers, "hidden_size": options.hidden, "intermediate_size": 4 * options.hidden, "vocab_size": 32_000}
    models = [write_llama(work / f"large{seed}", torch.bfloat16, "100MB", seed, **sizes) for seed in (0, 1)]
    size = sum(file.stat().st_size for file in models[0].glob("*.safetensors")) / 2**20
    for round_number in range(2):
        for name, (_, seconds, memory) in (
            ("mergekit", by_mergekit(options.mergekit, work / f"large_theirs{round_number}", models, [0.15, 0.85], "linear")),
            ("prism merge", by_prism(work / f"large_ours{round_number}", models, [0.15, 0.85], "linear")),
        ):
            print(f"two models of {size:,.0f} MiB: {name} {seconds:.1f} s, peak {memory:,.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
