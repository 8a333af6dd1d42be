"""Steps of RL at the true shapes of a published model, with random weights: the loop's own step, and what the generators then hold, hashed.

    torchrun --standalone --nproc-per-node 2 tests/benchmarks/rl_step.py --model llama-3.1-8b --device cuda --tp 2 [--output rl_step.json]
    torchrun --standalone --nproc-per-node 2 tests/benchmarks/rl_step.py --model HF_FOLDER --tp 2 --prompts 2 --samples 4 --written 8

Real: the sharded trainer with its optimizer, a generator on every rank (transformers), grading, advantages, the reference, the policy's step, the
stream of weights. Not real: weights, prompts (tokens drawn at random), tokenizer (each token reads as its number), and whether an answer is right,
which `reward.random` decides. The learning rate is large, so that every matrix changes in its bf16 value too. After each sync every tensor that the
trainer streams is hashed (SHA-256) and compared with the generator's on every rank; the count that changed since the sync before is printed beside.
"""

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent))
from weight_sync import generator_of, read_config

from megatron_prism import families
from megatron_prism.engine import device, parallel
from megatron_prism.engine.checkpoint import Progress
from megatron_prism.engine.loop import build_engine
from megatron_prism.engine.metrics import MetricsLog
from megatron_prism.engine.reference_model import Reference
from megatron_prism.engine.weight_sync import weight_stream
from megatron_prism.generate.digests import digest
from megatron_prism.generate.interface import NamedTensors
from megatron_prism.generate.transformers_backend import TransformersGenerator
from megatron_prism.grading import Pool, Question
from megatron_prism.planning.layout import make_plan
from megatron_prism.rl import generators, loop, metrics
from megatron_prism.rl.alarms import Watch
from megatron_prism.rl.loop import Run
from megatron_prism.rl.recipe import RLConfig
from megatron_prism.rl.records import Prompt
from megatron_prism.rl.rollouts import on_all

PROMPT_TOKENS = 64
GIB = 2**30


def main() -> None:
    """Build, step, check, print on rank 0."""
    options = read_options()
    with ExitStack() as closing:
        run = build_run(options, closing)
        tell(run, f"{options.model}: {dist.get_world_size()} ranks; {vars(options)}")
        steps, known = [], hashes(stream(run))
        for _ in range(options.steps):
            found, known = checked_step(run, known)
            steps.append(found)
            tell(run, described(found))
    if run.is_main:
        report(options, steps)
    parallel.stop()


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a published model's name, or a folder with a config.json")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--output", type=Path, help="JSON of the figures")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/rl_step"), help="folder for the run's log")
    for name, default in (("tp", 1), ("pp", 1), ("steps", 2), ("prompts", 8), ("samples", 16), ("written", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def recipe(options: argparse.Namespace) -> RLConfig:
    """An RL recipe without a checkpoint or prompts to read."""
    return RLConfig.model_validate({
        "output": options.scratch, "steps": 1000, "device": options.device, "precision": options.precision, "recompute": "selective",
        "model": {"checkpoint": options.scratch / "random"},
        "prompts": {"prompts_per_step": options.prompts, "sources": [{"task": "gcd"}]},
        "rollout": {"responses_per_prompt": options.samples, "context": 4096, "max_new_tokens": options.written},
        "generation": {"device": options.device, "batch_size": 128},
        "reward": {"format": "off", "random": 0.5},
        "parallel": {"tp": options.tp, "pp": options.pp, "sp": options.tp > 1},
        "optimizer": {"lr": 1e-3}, "schedule": {"kind": "constant", "warmup_steps": 0},
    })  # fmt: skip


def build_run(options: argparse.Namespace, closing: ExitStack) -> Run:
    """What `rl.loop.build_run` builds, from random weights."""
    cfg, config = recipe(options), read_config(options.model)
    place = device.setup(options.device)
    parallel.start(place)
    model = families.find(config).model_config(config)
    world = dist.get_world_size()
    dp = max(world // cfg.parallel.model_ranks, 1)
    mesh = parallel.build_mesh(make_plan(model, cfg.parallel, world, cfg.buffer_tokens, dp, 1), seed=1)
    engine = build_engine(cfg.training, model, mesh, place)
    dtype = getattr(torch, cfg.generation.dtype)
    print(f"rank {mesh.rank}: trainer built", flush=True)
    generator = generator_of(config, lambda: weight_stream(engine, model, dtype, ranks="all"), place)
    assert generator is not None
    print(f"rank {mesh.rank}: generator built", flush=True)
    tokenizer = number_tokenizer(model.vocab_size)
    generator = TransformersGenerator(generator.model, tokenizer, cfg.generation.batch_size, eos_ids=[])
    log = MetricsLog(cfg.output, cfg.log, 0, cfg.steps, enabled=False, settings={})
    pool = closing.enter_context(Pool(2)) if mesh.rank == 0 else None
    reference = Reference(engine, on_host=cfg.reference_on_host)
    prompts: Any = RandomPrompts(options.prompts, model.vocab_size)
    watch, unsolved = Watch.of(cfg.alarms.window, None), metrics.Unsolved(set())
    return Run(cfg, model, engine, prompts, tokenizer, generator, pool, reference, [], Progress(), log, watch, unsolved)


def number_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Token i reads as the text "i"."""
    tokenizer = Tokenizer(models.WordLevel({str(number): number for number in range(vocab_size)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="0")


class RandomPrompts:
    """Prompts of tokens drawn from the step's number, each asked for a number that hardly anyone guesses."""

    def __init__(self, count: int, vocab_size: int):
        self.count, self.vocab_size = count, vocab_size
        self.prompts = self.prompts_at(0)

    def prompts_at(self, step: int) -> list[Prompt]:
        """The step's prompts."""
        drawn = torch.randint(self.vocab_size, (self.count, PROMPT_TOKENS), generator=torch.Generator().manual_seed(step)).tolist()
        return [
            Prompt(f"{step}-{place}", "numbers", Question("which?", "exact", "numbers", {"answer": "?"}), tuple(tokens))
            for place, tokens in enumerate(drawn)
        ]


def checked_step(run: Run, before: dict[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """One step of the loop, then the sync that the next one begins with, and every tensor hashed on both sides; before: the hashes until now."""
    if run.engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    _, _, figures = loop._step(run)
    peaks = on_all(lambda _: torch.cuda.max_memory_allocated() / GIB if run.engine.device.type == "cuda" else 0.0)
    generators.wake(run.cfg, run.generator)
    dist.barrier()
    began = time.perf_counter()
    loop.sync(run)
    dist.barrier()
    seconds = time.perf_counter() - began
    assert isinstance(run.generator, TransformersGenerator)
    sent, held = hashes(stream(run)), hashes(run.generator.held_weights().items())
    wrong = on_all(lambda _: [name for name in sent if sent[name] != held.get(name)])
    found = {"figures": figures, "sync_seconds": seconds, "synced_gb": sum(tensor.nbytes for _, tensor in stream(run)) / 1e9, "peak_gib": peaks}
    changed = sum(sent[name] != before[name] for name in sent)
    return found | {"tensors": len(sent), "changed": changed, "differing": sorted({name for names in wrong for name in names})}, sent


def stream(run: Run) -> NamedTensors:
    """What generators are given."""
    return weight_stream(run.engine, run.model_config, getattr(torch, run.cfg.generation.dtype), ranks="all")


def hashes(tensors: NamedTensors) -> dict[str, str]:
    """SHA-256 of each."""
    with ThreadPoolExecutor(8) as threads:
        tasks = {name: threads.submit(digest, tensor.detach().cpu().clone()) for name, tensor in tensors}
        return {name: task.result() for name, task in tasks.items()}


def tell(run: Run, text: str) -> None:
    """On rank 0, at once: a run that is cut off has said how far it came."""
    if run.is_main:
        print(text, flush=True)


def described(step: dict[str, Any]) -> str:
    """A step, for people."""
    found = step["figures"]
    phases = ", ".join(f"{name.removeprefix('seconds/')} {value:.2f}" for name, value in found.items() if name.startswith("seconds/"))
    same = "all equal" if not step["differing"] else f"{len(step['differing'])} DIFFER: {step['differing'][:3]}"
    return (
        f"  {phases} s; mismatch {found['mismatch']:.1e}; sync {step['sync_seconds']:.2f} s of {step['synced_gb']:.2f} GB; "
        f"{step['tensors']} tensors hashed, {step['changed']} changed, {same}; peak {max(step['peak_gib']):.1f} GiB"
    )


def report(options: argparse.Namespace, steps: list[dict[str, Any]]) -> None:
    """The medians of the steps after the first; every step's figures to --output."""
    later = steps[1:] or steps
    print("  " + ", ".join(f"{key} {statistics.median(step['figures'][key] for step in later):,.2f}" for key in SPEEDS))
    if options.output is not None:
        found = {"options": {key: str(value) for key, value in vars(options).items()}, "steps": steps}
        options.output.write_text(json.dumps(found, indent=1, default=str))


SPEEDS = ("seconds_per_step", "generation_share", "generated_tokens_per_second", "trained_tokens_per_second")

if __name__ == "__main__":
    main()
