"""Does training in FP8 follow training in bf16? Four layers of true 8B width, dense and hybrid, from one initialisation, on real text.

    python tests/benchmarks/fp8_convergence.py --work DIR [--steps 1000] [--seq 4096] [--warm-start 500] [--jobs MODEL:RUN ...]

Real text: the source files of this Python's standard library, as bytes. The initialisation of all runs of a model: random weights after `warm-start`
steps in bf16 (mid-training starts from a trained model, too; from random weights a run sits on a plateau for hundreds of steps, and when it leaves
is chance, whatever the precision: --warm-start 0). The measure is the mean, over the last fifth of the steps, of the difference of two runs' losses:
FP8 minus bf16, beside that of two bf16 runs which differ in the order of their data alone. A run whose scales are 16 times too large, so that large
values saturate, shows what the measure sees. Runs go to all GPUs in turn, one on each. tests/gpu/test_gpu_fp8.py holds the result.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

VOCAB_SIZE = 512
"""bytes, padded to a size that FP8 layers would take"""
FAULT = "delayed, scales 16 times too large"
START = "start"
RUNS: dict[str, tuple[list[str], int]] = {
    "bf16": ([], 1),
    "bf16, other order": ([], 2),
    "bf16, third order": ([], 3),
    "tensorwise": (["fp8.recipe=tensorwise"], 1),
    "delayed": (["fp8.recipe=delayed"], 1),
    "blockwise": (["fp8.recipe=blockwise"], 1),
    "tensorwise, ends in bf16": (["fp8.recipe=tensorwise", "fp8.bf16_layers_at_start=1", "fp8.bf16_layers_at_end=1"], 1),
    FAULT: (["fp8.recipe=delayed"], 1),
    START: ([], 4),
}
"""Name -> (overrides, seed of the data's order)."""


def models() -> dict[str, dict[str, Any]]:
    """config.json of the two models: layer shapes of LLaMA-3.1-8B, and of Nemotron-H-8B with one attention among its mixers and MLPs."""
    from megatron_prism import families

    dense = {**families.published("llama-3.1-8b"), "num_hidden_layers": 4, "vocab_size": VOCAB_SIZE}
    pattern = {"hybrid_override_pattern": "M-*-", "num_hidden_layers": 4, "vocab_size": VOCAB_SIZE}
    return {"dense": dense, "hybrid": {**families.published("nemotron-h-8b-base-8k"), **pattern}}


def write_inputs(work: Path, configs: dict[str, dict[str, Any]], tokens: int) -> None:
    """The models' configs, and the text in both orders."""
    from tiny_blend import write_source

    from megatron_prism.data_prep.blend import Blend, BlendSource, write_blend

    for name, config in configs.items():
        (work / name).mkdir(parents=True)
        (work / name / "config.json").write_text(json.dumps(config))
        (work / name / "tokenizer.json").write_text("{}")
    documents, found = [], 0
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if found < tokens and "site-packages" not in file.parts and "test" not in file.parts:
            documents.append([*file.read_bytes(), VOCAB_SIZE - 1])
            found += len(documents[-1])
    write_source(work / "text", "stdlib", "train", documents, VOCAB_SIZE)
    for seed in {seed for _, seed in RUNS.values()}:
        write_blend(work / "text" / f"order{seed}.toml", Blend(seed, (BlendSource("stdlib", "code", 1.0, work / "text" / "stdlib" / "train"),)))


def train(work: Path, model: str, name: str, steps: int, seq: int, lr: float) -> None:
    """One run; writes its losses. The run called `start` writes the checkpoint that the others begin with."""
    from megatron_prism.config import load_recipe
    from megatron_prism.engine import loop
    from megatron_prism.engine import model as engine_model
    from megatron_prism.engine.recipe import TrainConfig

    overrides, seed = RUNS[name]
    random = [f"model.hf_config={work}/{model}", f"model.tokenizer={work}/{model}"]
    start = work / "runs" / model / START
    values = [
        f"output={work}/runs/{model}/{name}", *([f"model.checkpoint={start}"] if start.exists() and name != START else random), f"optimizer.lr={lr}",
        f"data.blend={work}/text/order{seed}.toml", f"data.seq_len={seq}", f"steps={steps}", "global_batch=1", "schedule.warmup_steps=50",
    ]  # fmt: skip
    plain = engine_model._fp8_settings
    fault = {"fp8_margin": -4} if name == FAULT else {}
    with mock.patch.object(engine_model, "_fp8_settings", lambda *args: {**plain(*args), **fault}):
        cfg = load_recipe(None, [*values, *overrides], TrainConfig)
        if name == START:
            loop.train(cfg)
            return
        run = loop.build_run(cfg)
    losses = [loop._step(run).loss for _ in range(steps)]
    run.close()
    target = work / "losses" / model / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(losses))


def gaps(work: Path) -> dict[str, dict[str, float]]:
    """Of each model, each run's loss minus the first bf16 run's, mean over the last fifth of the steps; and the bf16 run's own loss."""
    found: dict[str, dict[str, float]] = {}
    for folder in sorted((work / "losses").iterdir()):
        losses = {file.stem: json.loads(file.read_text()) for file in sorted(folder.iterdir())}
        last = slice(-max(len(losses["bf16"]) // 5, 1), None)
        mean = {name: sum(values[last]) / len(values[last]) for name, values in losses.items()}
        found[folder.name] = {"bf16": mean["bf16"], **{f"{name} - bf16": value - mean["bf16"] for name, value in mean.items() if name != "bf16"}}
    return found


def run_all(work: Path, jobs: list[tuple[str, str]], steps: int, seq: int, lr: float, devices: int) -> None:
    """Each job in a process of its own, one on a GPU at a time. Errors: RuntimeError with the log of a run that failed."""
    waiting, running = list(jobs), dict[int, tuple[subprocess.Popen[bytes], Path]]()
    while waiting or running:
        for device in range(devices):
            if device in running and running[device][0].poll() is not None:
                process, log = running.pop(device)
                if process.returncode:
                    raise RuntimeError(f"{log.stem} failed:\n{log.read_text()[-3000:]}")
            if device not in running and waiting:
                model, name = waiting.pop(0)
                log = work / f"{model} {name}.log"
                command = [sys.executable, __file__, "--work", str(work), "--steps", str(steps), "--seq", str(seq), "--lr", str(lr)]
                command += ["--job", model, name]
                environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(device)}
                running[device] = (subprocess.Popen(command, env=environment, stdout=log.open("wb"), stderr=subprocess.STDOUT), log)
        time.sleep(0.2)


def main() -> None:
    """All runs, then the table."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--warm-start", type=int, default=500, help="bf16 steps before all runs; 0: random weights")
    everything = [f"{model}:{name}" for model in ("dense", "hybrid") for name in RUNS if name != START and (name != FAULT or model == "dense")]
    parser.add_argument("--jobs", nargs="+", default=everything, help=f"of: {'; '.join(everything)}")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        train(options.work, *options.job, options.steps, options.seq, options.lr)
        return
    write_inputs(options.work, models(), options.steps * options.seq + 100_000)
    jobs = [(model, name) for model, name in (job.split(":") for job in options.jobs)]
    devices = max(torch.cuda.device_count(), 1)
    if options.warm_start:
        starts = [(model, START) for model in dict.fromkeys(model for model, _ in jobs)]
        run_all(options.work, starts, options.warm_start, options.seq, options.lr, devices)
    run_all(options.work, jobs, options.steps, options.seq, options.lr, devices)
    found = gaps(options.work)
    (options.work / "gaps.json").write_text(json.dumps(found, indent=2))
    for model, values in found.items():
        print(f"{model}: " + ", ".join(f"{name} {value:+.4f}" for name, value in values.items()))


if __name__ == "__main__":
    main()
