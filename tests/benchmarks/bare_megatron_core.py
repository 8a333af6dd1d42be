"""The bare megatron-core loop by itself: what `prism bench` measures beside our engine (megatron_prism/engine/bench/bare.py says what is in it).

    torchrun --nproc-per-node N tests/benchmarks/bare_megatron_core.py [--model llama-3.1-8b:8 ...] [--precision bf16 delayed tensorwise blockwise]
        [--vocab 32000] [--seq 8192] [--accum 1] [--recompute LAYERS] [--tp 1] [--cp 1] [--steps 10] [--json FILE]

The model is a published one (`prism plan` names them), whole or its first layers; or a LLaMA of a shape: --hidden 4096 --ffn 14336 --heads 32
--groups 8 --layers 8.
"""

import argparse
import dataclasses
import json
import os
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from megatron_prism.engine.bench.cases import Case, Config, resolve
from megatron_prism.errors import UserError

SHAPE = ("hidden", "ffn", "heads", "groups", "layers")


def main() -> None:
    """Measure every model in every precision; print a line each, and a table."""
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        models = options.model or [write_shape(Path(folder) / f"llama-{options.hidden}x{options.layers}", options)]
        results = measure(prepare(options, models, Path(folder)))
    if int(os.environ.get("RANK", "0")) == 0:
        for found in results:
            show(found)
        if options.json is not None:
            options.json.write_text(json.dumps(results, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", help="NAME or NAME:LAYERS")
    parser.add_argument("--precision", nargs="+", default=["bf16"], choices=["fp32", "bf16", "delayed", "tensorwise", "blockwise"])
    parser.add_argument("--vocab", type=int, help="default: the model's own; 32000 for a shape")
    for name, default in (("seq", 8192), ("accum", 1), ("micro", 1), ("recompute", 0), ("tp", 1), ("cp", 1), ("warmup", 5), ("steps", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in zip(SHAPE, (4096, 14336, 32, 8, 8), strict=True):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def write_shape(folder: Path, options: argparse.Namespace) -> str:
    """The config.json of a LLaMA of the shape that the flags say."""
    folder.mkdir()
    config = {
        "model_type": "llama", "hidden_size": options.hidden, "intermediate_size": options.ffn, "num_attention_heads": options.heads,
        "num_key_value_heads": options.groups, "num_hidden_layers": options.layers, "vocab_size": options.vocab or 32000,
        "max_position_embeddings": options.seq, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "tie_word_embeddings": False, "hidden_act": "silu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def prepare(options: argparse.Namespace, models: list[str], folder: Path) -> list[Case]:
    """The cases of `prism bench` that these flags mean, for this launch."""
    shared: dict[str, Any] = {
        "data": {"seq_len": options.seq},
        "micro_batch": options.micro,
        "device": options.device,
        "parallel": {"tp": options.tp, "sp": options.tp > 1 and options.device != "cpu"},
        **({"recompute": "full", "recompute_layers": options.recompute} if options.recompute else {}),
    }
    cases = []
    for model, precision in product(models, options.precision):
        kind = {"precision": precision} if precision in ("fp32", "bf16") else {"fp8": {"recipe": precision}}
        cases.append({"model": model, "name": f"{Path(model).name} {precision}", "train": {**shared, **kind}})
    recipe = Config(
        output=Path("unset"), cases=cases, vocab_size=options.vocab, micro_batches=options.accum, warmup=options.warmup, steps=options.steps, rounds=1
    )
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks % (options.tp * options.cp):
        raise UserError(f"--tp {options.tp} * --cp {options.cp} must divide the {ranks} ranks of this launch")
    # our own layouts have no context parallelism yet: plan for one rank of each group, then widen it
    found = resolve(recipe, ranks // options.cp, folder / "cases")
    return [dataclasses.replace(case, plan=dataclasses.replace(case.plan, cp=options.cp)) for case in found]


def measure(cases: list[Case]) -> list[dict[str, Any]]:
    """The figures of each case, rank 0's; a case that fails says why."""
    from megatron_prism.engine import device, parallel
    from megatron_prism.engine.bench.bare import BareLoop
    from megatron_prism.engine.bench.clock import matmul_tflops
    from megatron_prism.engine.bench.measure import Bench, CaseError, Site

    place = device.setup(cases[0].train.device)
    parallel.start(place)
    bench, results = Bench(place), []
    for case in cases:
        site = Site(case, parallel.build_mesh(case.plan, case.train.seed), *matmul_tflops(place))

        def work(site: Site = site) -> dict[str, Any]:
            bare = bench.open("bare_megatron_core", lambda: BareLoop(site.case, site.mesh, place), site.case.options.warmup)
            bench.turns([(bare.side, bare.timing)], site.case)
            found = bench.side_figures(site, bare)
            bare.side.close()
            return found

        try:
            results.append({"name": case.name, **bench.together(work), "matmul_tflops": site.ceiling, "layout": case.plan.describe()})
        except CaseError as error:
            results.append({"name": case.name, "failed": str(error)})
    parallel.stop()
    return results


def show(found: dict[str, Any]) -> None:
    """A line for a case."""
    if "failed" in found:
        print(f"{found['name']}: failed: {found['failed']}")
        return
    step, parts, memory = found["step_ms"], found["split_ms"], found["memory"]
    print(
        f"{found['name']}, {found['layout']}: step {step['median']:.1f} ms ({step['min']:.1f} to {step['max']:.1f}), optimizer "
        f"{parts['optimizer']:.1f}; {found['tokens_per_second_per_gpu']:,.0f} tokens/s/GPU, {found['tflops_per_gpu_causal']:.1f} TFLOP/s/GPU causal, "
        f"{found['share_of_matmul_causal']:.1%} of {found['matmul_tflops']:.0f}" + (f"; {memory['peak_allocated_gib']:.1f} GiB" if memory else "")
    )


if __name__ == "__main__":
    main()
