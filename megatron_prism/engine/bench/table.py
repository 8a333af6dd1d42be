"""The results of a benchmark for people: a line when a case is done, tables at the end. No torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_prism.engine.bench.figures import PARTS

CONVENTIONS = {
    "step": "everything that a step of training is: reading samples, forward, backward, reduction, clipping, AdamW, reading the loss",
    "tflops": "model FLOPs (planning/flops.py): forward and backward, LM head counted, recomputation not; causal: the keys that a query may see, "
    "full: as if there were no causal mask",
    "share_of_matmul": "TFLOP/s with causal attention over those of one large matrix product (CPU: fp32) on the same device in the same run",
    "ratio": "our speed over the baseline's (above 1: ours is faster): median over rounds; lower_bound: of that median, at 95 % (sign test)",
    "split": "mean milliseconds of a step on the device's time line, rank 0; data: the device waits for samples; other: what is left",
    "memory": "largest over the ranks; peak: from before the model is built to after warm-up",
}
WIDTH = 190


def failures(case: dict[str, Any]) -> list[str]:
    """What failed in a case: the case itself, or baselines."""
    found = [f"{case['name']}: {case['failed']}"] if "failed" in case else []
    if "failed" in case.get("ours", {}).get("profile", {}):
        found.append(f"{case['name']}, profile: {case['ours']['profile']['failed']}")
    return found + [f"{case['name']}, {name}: {side['failed']}" for name, side in case.get("baselines", {}).items() if "failed" in side]


def say(case: dict[str, Any]) -> None:
    """One line for a case, as soon as it is done."""
    if "failed" in case:
        print(f"{case['name']}: failed: {case['failed'].splitlines()[0]}", flush=True)
        return
    ours, memory = case["ours"], case["ours"]["memory"]
    beside = "".join(f"; {_ratio(side)} of {name}" for name, side in case.get("baselines", {}).items() if "ratio" in side)
    peak = f", {memory['peak_allocated_gib']:.1f} GiB" if memory else ""
    print(
        f"{case['name']}: step {_spread(ours['step_ms'])} ms, {ours['tokens_per_second_per_gpu']:,.0f} tokens/s/GPU, "
        f"{_rate(ours['tflops_per_gpu_causal'])} TFLOP/s/GPU ({ours['share_of_matmul_causal']:.1%} of the matmul rate){peak}{beside}",
        flush=True,
    )


def show(results: dict[str, Any], path: Path) -> None:
    """All cases: speed of each side, and where the time of a step goes."""
    from rich.console import Console

    console = Console(highlight=False, width=WIDTH)
    measured = [case for case in results["cases"] if "failed" not in case]
    if measured:
        console.print(_speeds(measured))
        console.print(_splits(measured))
    for case in measured:
        for note in _notes(case):
            console.print(note, markup=False)
    for text in (text for case in results["cases"] for text in failures(case)):
        console.print(f"failed: {text}", markup=False)
    if results.get("not_begun"):
        console.print(f"not begun, time was up: {', '.join(results['not_begun'])}", markup=False)
    console.print(f"TFLOP/s: model FLOPs, recomputation not counted; share: causal, of the matmul rate measured in the same run. All figures: {path}")


def _speeds(cases: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title="speed")
    for heading in (
        "case",
        "side",
        "precision",
        "step, ms (min to max)",
        "tokens/s/GPU",
        "TFLOP/s causal",
        "full",
        "share",
        "peak GiB",
        "ours is faster by",
    ):
        table.add_column(heading, justify="left" if heading in ("case", "side", "precision") else "right", no_wrap=True)
    for case in cases:
        for name, side in _sides(case):
            memory = f"{side['memory']['peak_allocated_gib']:.1f}" if side["memory"] else ""
            cells = [case["name"] if name == "ours" else "", name, case["precision"] if name == "ours" else "", _spread(side["step_ms"])]
            cells += [f"{side['tokens_per_second_per_gpu']:,.0f}", _rate(side["tflops_per_gpu_causal"]), _rate(side["tflops_per_gpu_full"])]
            table.add_row(*cells, f"{side['share_of_matmul_causal']:.1%}", memory, _ratio(side) if "ratio" in side else "")
        table.add_section()
    return table


def _splits(cases: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title="a mean step, ms")
    shown = [part for part in PARTS if part != "graph" or any(case.get("cuda_graphs") for case in cases)]
    for heading in ("case", "side", *shown, "other", "communication", "of it exposed", "device idle", "host syncs"):
        table.add_column(heading, justify="left" if heading in ("case", "side") else "right", no_wrap=True)
    for case in cases:
        for name, side in _sides(case):
            parts = [f"{side['split_ms'][part]:.1f}" for part in (*shown, "other")]
            profile = side.get("profile") or {}
            found = [profile.get(key) for key in ("communication_ms", "exposed_communication_ms", "device_idle_ms")]
            syncs = profile.get("host_synchronisations", {}).get("count")
            cells = ["not measured" if value is None else f"{value:.1f}" for value in found] + ["not measured" if syncs is None else str(syncs)]
            table.add_row(case["name"] if name == "ours" else "", name, *parts, *(cells if name == "ours" else [""] * 4))
        table.add_section()
    return table


def _sides(case: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "ours", case["ours"]
    yield from ((name, side) for name, side in case.get("baselines", {}).items() if "step_ms" in side)


def _notes(case: dict[str, Any]) -> Iterator[str]:
    for name, side in _sides(case):
        yield from (f"{case['name']}, {name}: {note}" for note in side["notes"])
    yield from (f"{case['name']}: {name} skipped: {side['skipped']}" for name, side in case.get("baselines", {}).items() if "skipped" in side)


def _spread(step_ms: dict[str, Any]) -> str:
    return f"{step_ms['median']:.1f} ({step_ms['min']:.1f} to {step_ms['max']:.1f})"


def _rate(tflops: float) -> str:
    return f"{tflops:.1f}" if tflops >= 1 else f"{tflops:.4f}"


def _ratio(side: dict[str, Any]) -> str:
    found = side["ratio"]
    bound = "" if found["lower_bound"] is None else f" (>= {found['lower_bound']:.3f})"
    return f"{found['median']:.3f}x{bound}"
