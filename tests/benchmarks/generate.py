"""Tokens per second of generation on a CPU: our vLLM backend beside vLLM's own offline `LLM.generate`, continuous batching beside static batches,
and our two backends beside each other.

    PRISM_VLLM_PYTHON=VLLM/bin/python python tests/benchmarks/generate.py vllm --model HF_FOLDER [--requests 64] [--rounds 5]
    python tests/benchmarks/generate.py transformers --model HF_FOLDER [--requests 96] [--rounds 5] [--lm-eval]
    PRISM_VLLM_PYTHON=VLLM/bin/python python tests/benchmarks/generate.py backends --model HF_FOLDER [--requests 64] [--rounds 5]

Prompts of random tokens; how much each completion writes is drawn from a long-tailed distribution (end-of-sequence tokens are off), the same requests
for both sides, which take turns. The offline side lives in vllm_offline.py, in a process of vLLM's Python, with the same settings. Static batches:
`model.generate` over prompts sorted by length, each batch as long as its longest completion, of which only what was asked counts.
--lm-eval adds the HF backend of lm-eval, where it is installed (the same batches; what it ends early at an end-of-sequence token counts as written).
One thread each; medians of rounds, and the load, because other work shares the machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prism import generate
from megatron_prism.generate import Generator, Request, Sampling
from megatron_prism.generate.vllm_backend import VllmGenerator

OFFLINE = Path(__file__).with_name("vllm_offline.py")
CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
FLAGS = {"enforce-eager": True, "no-enable-prefix-caching": True}


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=("vllm", "transformers", "backends"))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--mean-tokens", type=float, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--lm-eval", action="store_true")
    options = parser.parse_args()
    os.environ |= {name: value for name, value in CPU.items() if name not in os.environ}
    asked = make_requests(options)
    limits = [request.max_new_tokens or 0 for request in asked]
    print(f"{len(asked)} requests, completions of {min(limits)} to {max(limits)} tokens (median {statistics.median(limits):.0f}, sum {sum(limits)})")
    print(options)
    {"vllm": measure_vllm, "transformers": measure_transformers, "backends": measure_backends}[options.side](options, asked)


def make_requests(options: argparse.Namespace) -> list[Request]:
    """Random prompts of 8 to 64 tokens; lengths of completions with a long tail, at most 8 times their mean."""
    vocab_size = json.loads((options.model / "config.json").read_text())["vocab_size"]
    random = np.random.default_rng(0)
    lengths = random.integers(8, 65, options.requests)
    limits = np.clip(random.lognormal(np.log(options.mean_tokens) - 0.5, 1.0, options.requests), 1, 8 * options.mean_tokens).astype(int)
    prompts = [tuple(random.integers(10, vocab_size, length).tolist()) for length in lengths]
    return [Request(prompt, place, max_new_tokens=int(limit)) for place, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))]


def complete(generator: Generator, asked: list[Request]) -> int:
    """Tokens written."""
    sampling = Sampling(temperature=1.0, max_new_tokens=max(request.max_new_tokens or 1 for request in asked))
    written: list[int] = []
    generator.generate_requests(asked, sampling, lambda request, done: written.append(len(done.tokens)))
    return sum(written)


def measure_vllm(options: argparse.Namespace, asked: list[Request]) -> None:
    """Ours and the offline engine, in turns; both are up all the time, and only one works."""
    with open_vllm(options) as generator, Offline(options, asked) as offline:
        compare(options, {"ours": lambda: complete(generator, asked), "vLLM's LLM.generate": offline.run})


def measure_backends(options: argparse.Namespace, asked: list[Request]) -> None:
    """vLLM's server and transformers in this process, in turns, each as RL asks it."""
    with open_vllm(options) as vllm:
        ours = open_transformers(options)
        compare(options, {"vllm": lambda: complete(vllm, asked), "transformers": lambda: complete(ours, asked)})


def open_vllm(options: argparse.Namespace) -> VllmGenerator:
    """A server that knows no end of a sequence."""
    settings: dict[str, Any] = {"batch_size": options.batch_size, "dtype": options.dtype, "max_model_len": 1024, "server_flags": FLAGS}
    generator = generate.load(options.model, "vllm", **settings)
    assert isinstance(generator, VllmGenerator)
    generator.speller.eos_ids = []
    return generator


def open_transformers(options: argparse.Namespace) -> Any:
    """The same in this process, on one thread."""
    import torch

    from megatron_prism.generate.transformers_backend import TransformersGenerator

    torch.set_num_threads(1)
    generator = TransformersGenerator.load(options.model, "cpu", options.dtype, options.batch_size)
    generator.speller.eos_ids = []
    return generator


class Offline:
    """A process of vllm_offline.py."""

    def __init__(self, options: argparse.Namespace, asked: list[Request]):
        command = [os.environ["PRISM_VLLM_PYTHON"], str(OFFLINE), str(options.model.resolve()), options.dtype, str(options.batch_size)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.tell(json.dumps([[list(request.prompt), request.max_new_tokens] for request in asked]))

    def tell(self, line: str) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        for answer in self.process.stdout:
            if answer.startswith("done "):
                return answer
        raise RuntimeError("vllm_offline.py ended; run it by hand to see why")

    def run(self) -> int:
        """One pass over the requests; tokens written."""
        return int(self.tell("go").split()[1])

    def __enter__(self) -> "Offline":
        return self

    def __exit__(self, *error: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure_transformers(options: argparse.Namespace, asked: list[Request]) -> None:
    """Continuous, static, and lm-eval's batches over one loaded model."""
    generator = open_transformers(options)
    sides: dict[str, Callable[[], int]] = {
        "ours, continuous": lambda: complete(generator, asked),
        "static batches": lambda: static(generator.model, asked, options.batch_size),
    }
    if options.lm_eval:
        sides["lm-eval's HF backend"] = lm_eval(generator, asked, options.batch_size)
    compare(options, sides)


def static(model: Any, asked: list[Request], batch_size: int) -> int:
    """`model.generate` batch by batch; tokens that were asked for."""
    import torch

    for batch in batches(asked, batch_size):
        width = max(len(request.prompt) for request in batch)
        ids = torch.tensor([[0] * (width - len(request.prompt)) + list(request.prompt) for request in batch])
        mask = torch.tensor([[0] * (width - len(request.prompt)) + [1] * len(request.prompt) for request in batch])
        longest = max(request.max_new_tokens or 1 for request in batch)
        settings = {"max_new_tokens": longest, "do_sample": True, "top_k": 0, "eos_token_id": None, "pad_token_id": 0}
        with torch.inference_mode():
            model.generate(input_ids=ids, attention_mask=mask, **settings)
    return sum(request.max_new_tokens or 1 for request in asked)


def batches(asked: list[Request], batch_size: int) -> list[list[Request]]:
    """Prompts of similar length together."""
    rows = sorted(asked, key=lambda request: len(request.prompt))
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def lm_eval(generator: Any, asked: list[Request], batch_size: int) -> Callable[[], int]:
    """The HF backend of lm-eval over the same model and the same batches, each up to its longest completion, as if the others ended by themselves."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=generator.model, tokenizer=generator.tokenizer, batch_size=batch_size, backend="causal")

    def run() -> int:
        for batch in batches(asked, batch_size):
            settings = {"max_gen_toks": max(request.max_new_tokens or 1 for request in batch), "until": [], "do_sample": True, "temperature": 1.0}
            texts = [generator.tokenizer.decode(request.prompt) for request in batch]
            instances = [Instance("generate_until", {}, (text, dict(settings)), place) for place, text in enumerate(texts)]
            model.generate_until(instances, disable_tqdm=True)
        return sum(request.max_new_tokens or 1 for request in asked)

    return run


def compare(options: argparse.Namespace, sides: dict[str, Callable[[], int]]) -> None:
    """Every side once to warm up, then in turns."""
    for run in sides.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(options.rounds):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            began = time.monotonic()
            found[name].append(sides[name]() / (time.monotonic() - began))
        rates = ", ".join(f"{name} {rates[-1]:.1f}" for name, rates in found.items())
        print(f"round {number + 1}, load {os.getloadavg()[0]:.1f}: {rates}", flush=True)
    first = next(iter(sides))
    for name, rates in found.items():
        ratio = statistics.median(ours / other for ours, other in zip(found[first], rates, strict=True))
        print(f"{name}: {statistics.median(rates):.1f} tokens/s ({min(rates):.1f} to {max(rates):.1f}); {first} / this: {ratio:.3f}")


if __name__ == "__main__":
    main()
