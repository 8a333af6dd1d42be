"""Law 3 on eight real ranks: every way to cut a model over tp x pp x cp x dp = 8 gives the loss curve and the gradient norms of one rank.

    python tests/laws/eight_ranks.py dense cpu --folder DIR --json FILE     (or hybrid, transformer_engine; or cuda); FILE grows with each launch
    differences("dense", folder, "cpu")   ->   {layout: (first step, worst step)}, None

fp32 with our own layers, on gloo or NCCL; TransformerEngine's in bf16 on GPUs alone. One launch of one rank for the start, one for its curve, then
eight ranks for some layouts at a time (megatron-core frees no group, so a process gets larger with each); where a launch ends early, the layouts that
were done are given, and the error. test_eight_ranks.py holds some layouts on every machine; tests/benchmarks/eight_h200.py runs all of them.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
from tiny_models import TINY
from training import TINY_LLAMA, VOCAB_SIZE, largest_difference, metrics, run_cases

RANKS = 8
AT_A_TIME = 6
"""layouts of a launch"""
Differences = dict[str, tuple[float, float]]
"""layout -> (first step, worst step)"""
SETTINGS: dict[str, Any] = {
    "data__seq_len": 128,
    "steps": 3,
    "global_batch": 8,
    "optimizer__lr": 1e-3,
    "optimizer__eps": 1e-2,  # a small one makes of the first updates nearly the gradients' signs, and rounding grows (test_context_parallel.py)
}
DENSE = {**TINY_LLAMA, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 8, "num_hidden_layers": 8, "intermediate_size": 192}
HYBRID = {**TINY["nemotron_h"], "num_attention_heads": 8, "num_key_value_heads": 8, "n_groups": 8, "head_dim": 8}
MODELS = {"dense": DENSE, "hybrid": HYBRID, "transformer_engine": {**DENSE, "hidden_size": 128, "intermediate_size": 256, "head_dim": 32}}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {"layers": "local", "precision": "fp32"},
    "hybrid": {"layers": "local", "precision": "fp32"},
    "transformer_engine": {"layers": "transformer_engine", "precision": "bf16"},
}
BOUNDS = {"dense": (1e-6, 1e-5), "hybrid": (1e-5, 1e-4), "transformer_engine": (2e-3, 1e-2)}
"""(first step, every step), relative: those of tests/gpu/test_gpu_context_parallel.py"""


def layout(tp: int, pp: int, cp: int, vpp: int | None = None) -> tuple[str, dict[str, Any]]:
    """A name, and the keys of a recipe; always with sequence parallelism where it can be."""
    keys: dict[str, Any] = {f"parallel.{name}": size for name, size in (("tp", tp), ("pp", pp), ("cp", cp), ("vpp", vpp)) if size and size > 1}
    name = f"tp={tp} pp={pp}{f'x{vpp}' if vpp else ''} cp={cp} dp={RANKS // (tp * pp * cp)}"
    return name, {**keys, **({"parallel.sp": "true"} if tp > 1 else {})}


def every_cut() -> list[tuple[int, int, int]]:
    """All tp, pp, cp whose product divides eight; dp is the rest."""
    return [cut for cut in product((1, 2, 4, 8), repeat=3) if RANKS % (cut[0] * cut[1] * cut[2]) == 0]


GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "dense": dict([*(layout(*cut) for cut in every_cut()), layout(1, 2, 1, 2), layout(2, 2, 1, 2), layout(1, 4, 2, 2), layout(2, 2, 2, 4)]),
    "hybrid": dict(layout(*cut) for cut in every_cut() if cut[1] <= 4),
    "transformer_engine": dict(layout(*cut) for cut in ((1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (2, 1, 2), (1, 2, 2), (2, 1, 4))),
}


def launches(
    group: str, folder: Path, device: str, names: list[str] | None = None, timeout: float = 1000
) -> Iterator[tuple[Differences, str | None]]:
    """After each launch of eight ranks: largest relative differences of its layouts to one rank; and what ended it early, or None.

    names: of the layouts to run; None: all of the group. timeout: seconds of each launch.
    """
    common = {**SETTINGS, **KINDS[group], "device": device}
    first = {**common, **KINDS["dense"], "steps": 1}
    run_cases(folder, 1, {"start": {"set": _start(folder, group)}}, folder=folder / "start", timeout=timeout, **first)
    load = {"model.checkpoint": str(folder / "start" / "start")}
    one = run_cases(folder, 1, {"one": {"set": load}}, folder=folder / "one", timeout=timeout, **common)["one"]
    cases = {name: {"set": {**keys, **load}} for name, keys in GROUPS[group].items() if names is None or name in names}
    for begin in range(0, len(cases), AT_A_TIME):
        part = dict(list(cases.items())[begin : begin + AT_A_TIME])
        place, error = folder / f"eight_{begin}", None
        try:
            run_cases(folder, RANKS, part, folder=place, timeout=timeout, **common)
        except AssertionError as failure:
            error = str(failure)
        found = {name: metrics(place / name) for name in part if (place / name / "COMPLETE").exists()}
        yield {name: (largest_difference(lines[:1], one[:1]), largest_difference(lines, one)) for name, lines in found.items()}, error


def differences(group: str, folder: Path, device: str, names: list[str] | None = None, timeout: float = 1000) -> tuple[Differences, str | None]:
    """Of all launches together, and the first error."""
    found: Differences = {}
    errors = []
    for some, error in launches(group, folder, device, names, timeout):
        found |= some
        errors += [error] if error is not None else []
    return found, next(iter(errors), None)


def _start(folder: Path, group: str) -> dict[str, str]:
    model = folder / "model"
    model.mkdir(parents=True)
    config = {**MODELS[group], "vocab_size": VOCAB_SIZE, "max_position_embeddings": SETTINGS["data__seq_len"]}
    (model / "config.json").write_text(json.dumps(config))
    (model / "tokenizer.json").write_text("{}")
    return {"model.hf_config": str(model), "model.tokenizer": str(model)}


def main() -> None:
    """The differences of a group, as a file that is written after each launch."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("group", choices=GROUPS)
    arguments.add_argument("device", choices=("cpu", "cuda"))
    arguments.add_argument("--folder", type=Path, required=True)
    arguments.add_argument("--json", type=Path, required=True)
    options = arguments.parse_args()
    told: dict[str, Any] = {"layouts": {}, "bounds": BOUNDS[options.group], "error": None}
    for found, error in launches(options.group, options.folder, options.device):
        told = {**told, "layouts": {**told["layouts"], **found}, "error": told["error"] or error}
        options.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
