"""Predictions and results of eight_h200.py as tables: what `prism plan` says of each case, what came of it, what neighbours publish. No torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from eight_cases import CHECKPOINT, CHECKPOINT_PARAMETERS, LAWS, PUBLISHED, SOURCES, Case

from megatron_prism.config import OptimizerConfig
from megatron_prism.engine.bench.cases import planned
from megatron_prism.engine.recipe import TrainConfig
from megatron_prism.planning.choices import Choice, Task
from megatron_prism.planning.cost import flops_per_token

MEMORY_GIB = 140.0
"""of an H200, as torch sees it, rounded; a tenth of it is left free by the plan"""
PEAK_TFLOPS = 989.0
"""dense bf16, by NVIDIA's data sheet; of FP8 it is twice that"""
CONVENTIONS = """\
tokens/s/GPU: tokens of the global batch over the median step and the GPUs; a step is everything that training does. TFLOP/s/GPU: model FLOPs, LM head
counted, recomputation not; causal: the keys that a query may see (Megatron-Bridge's convention), in brackets all keys (torchtitan's, and NeMo's
before Megatron-Bridge). MFU: causal, of 989 TFLOP/s (dense bf16), of 1,979 in FP8. GiB: of one GPU, torch's largest allocation."""


@dataclass(frozen=True)
class Prediction:
    """What the plan says of a case that is timed."""

    train: TrainConfig
    choice: Choice
    flops: tuple[float, float]
    """of a token, causal and full"""

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.choice.step.total

    @property
    def tokens(self) -> float:
        """A second, of one GPU."""
        return self.choice.tokens_per_second(self.train.data.seq_len)

    @property
    def gib(self) -> float:
        """Of the fullest GPU."""
        return self.choice.need.total / 2**30

    def rates(self, tokens: float | None = None) -> tuple[float, float]:
        """TFLOP/s of a GPU, causal and full, at so many tokens a second, else at those predicted."""
        return tuple(flops * (tokens or self.tokens) / 1e12 for flops in self.flops)


def predict(case: Case) -> Prediction:
    """Errors: UserError for a case that cannot be trained."""
    model, train, plan = planned(case.options, case.ranks)
    task = Task(model, case.ranks, train.data.seq_len, train.global_batch, training=train.training)
    choice = task.choice(plan, train.training, train.parallel.tp_comm_overlap)
    return Prediction(train, choice, tuple(flops_per_token(model, train.data.seq_len, causal) for causal in (True, False)))


def settings(prediction: Prediction) -> str:
    """Layout, recomputation and states, in words."""
    train, plan = prediction.train, prediction.choice.plan
    cuts = {"tp": plan.tp, "pp": plan.pp, "vpp": plan.vpp or 1, "cp": plan.cp, "dp": plan.dp}
    words = [" ".join(f"{name}={size}" for name, size in cuts.items() if size > 1) or "dp=1"]
    words[0] += f" {plan.cp_comm_type}" if plan.cp > 1 else ""
    if train.recompute:
        layers = f"{train.recompute_layers} layers" if train.recompute_layers else "all layers"
        words.append(f"{layers} recomputed{' but for attention' if train.keep_attention else ''}")
    plain, own = OptimizerConfig(), train.optimizer
    small = [name for name in ("moments", "gradients") if getattr(own, name) != getattr(plain, name)]
    words += [f"bf16 {' and '.join(small)}"] if small else []
    words += ["split masters"] if own.split_master else []
    return ", ".join([*words, f"{prediction.choice.global_batch} x {train.data.seq_len:,}"])


def share(prediction: Prediction, causal: float) -> str:
    """MFU."""
    return f"{causal / PEAK_TFLOPS / (1 if prediction.train.fp8 is None else 2):.0%}"


def predicted_table(cases: list[Case]) -> str:
    """Markdown: each case's settings, prediction, and the published rows beside it."""
    lines = ["| case | settings, sequences x tokens of a step | step, s | tokens/s/GPU | TFLOP/s/GPU | MFU | GiB | published |",
             "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |"]  # fmt: skip
    for case in cases:
        if case.kind == "bench":
            found = predict(case)
            causal, full = found.rates()
            figures = [f"{found.seconds:.2f}", f"{found.tokens:,.0f}", f"{causal:.0f} ({full:.0f})", share(found, causal), f"{found.gib:.0f}"]
            lines.append(f"| {' | '.join([case.name, settings(found), *figures, PUBLISHED.get(case.name, '')])} |")
    size = CHECKPOINT_PARAMETERS["cuda"]
    said = dict.fromkeys(LAWS, "loss and gradient norm of every layout within the law's bound of one rank")
    said[CHECKPOINT] = f"{size / 1e9:g} billion parameters, {14 * size / 2**30:.0f} GiB, beside the disk's own rate, which is not known"
    return "\n".join([*lines, *(f"| {case.name} | {said[case.name]} |  |  |  |  |  |  |" for case in cases if case.kind != "bench")])


def seconds_needed(case: Case) -> float:
    """On GPUs, roughly: a timed case by its prediction, with building the model; the others by guess. Measured by nobody yet."""
    return 15.0 + (case.options.warmup + case.options.steps) * predict(case).seconds if case.kind == "bench" else 120.0


def first_kernels(case: Case) -> float:
    """Seconds in which Triton tries configurations of Mamba's kernels, at most once for a shape: 101 to 109 s were seen without a cache."""
    return 105.0 if case.kind == "bench" and planned(case.options, case.ranks)[0].is_hybrid else 0.0


def results_table(cases: list[Case], find: Callable[[Case], dict[str, Any] | None], device: str) -> str:
    """Markdown: prediction, result and published row of each case, side by side."""
    lines = ["| case | predicted tokens/s/GPU, TFLOP/s, GiB | measured | TFLOP/s causal (full) | MFU | GiB | measured / predicted | published |",
             "| --- | --- | --- | --- | ---: | ---: | ---: | --- |"]  # fmt: skip
    for case in cases:
        entry = find(case)
        cells = _cells(case, entry, device)
        lines.append(f"| {' | '.join([case.name, *cells])} |")
    note = f"{CONVENTIONS}\n\n{SOURCES}" if device == "cuda" else "A dry run: tiny models on CPU processes. Their times say nothing."
    return "\n".join([*lines, "", note])


def _cells(case: Case, entry: dict[str, Any] | None, device: str) -> list[str]:
    published = PUBLISHED.get(case.name, "") if device == "cuda" else ""
    predicted = predict(case) if case.kind == "bench" and device == "cuda" else None
    said = "" if predicted is None else f"{predicted.tokens:,.0f}, {predicted.rates()[0]:.0f}, {predicted.gib:.0f}"
    if entry is None:
        return [said, "not run", "", "", "", "", published]
    if "failed" in entry:
        part = f"; {law_words(entry['result'])}" if case.kind == "law" and (entry.get("result") or {}).get("layouts") else ""
        return [said, f"failed: {first_line(entry['failed'])}{part}", "", "", "", "", published]
    if case.kind == "law":
        return [said, law_words(entry["result"]), "", "", "", "", published]
    if case.kind == "checkpoint":
        return [said, checkpoint_words(entry["result"]), "", "", "", "", published]
    ours = entry["result"]["ours"]
    tokens, causal, full = (ours[key] for key in ("tokens_per_second_per_gpu", "tflops_per_gpu_causal", "tflops_per_gpu_full"))
    gib = f"{ours['memory']['peak_allocated_gib']:.1f}" if ours["memory"] else ""
    if predicted is None:
        return [said, f"ran, loss {ours['loss']:.2f}", "", "", gib, "", published]
    return [said, f"{tokens:,.0f}", f"{causal:.0f} ({full:.0f})", share(predicted, causal), gib, f"{tokens / predicted.tokens:.2f}", published]


def law_words(result: dict[str, Any]) -> str:
    """The worst layout, and how many were held to the bound."""
    worst = max(result["layouts"].items(), key=lambda item: item[1][1])
    outside = [name for name, pair in result["layouts"].items() if any(a >= b for a, b in zip(pair, result["bounds"], strict=True))]
    said = f"outside: {', '.join(outside)}" if outside else "all inside"
    worst_one = f"worst {worst[1][1]:.1e} ({worst[0]}; first step {worst[1][0]:.1e})"
    return f"{len(result['layouts'])} layouts, {worst_one}, bound {result['bounds'][1]:.0e}: {said}"


def checkpoint_words(result: dict[str, Any]) -> str:
    """GB/s of the medians, and the stall."""
    rates = ", ".join(f"{name} {value:.2f}" for name, value in result["gb_per_second"].items())
    return f"{result['bytes'] / 1e9:.1f} GB, GB/s: {rates}"


def first_line(text: str) -> str:
    """Of an error, without what would break a table."""
    return text.strip().splitlines()[0].replace("|", "/")[:200] if text.strip() else "without a word"
