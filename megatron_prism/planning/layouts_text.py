"""A survey of layouts in words and tables of 80 columns: the best few, where the time and the memory of one go, and why not the others."""

import re
import textwrap
from collections import defaultdict
from dataclasses import dataclass, fields, replace

from megatron_prism.config import OptimizerConfig
from megatron_prism.families.model_config import ModelConfig
from megatron_prism.planning import cost
from megatron_prism.planning.budget import budget, readable_time
from megatron_prism.planning.choices import Choice, Survey, Task, offloaded, verdict
from megatron_prism.planning.flops import flops_per_token
from megatron_prism.planning.memory import MARGIN, loss_bytes
from megatron_prism.planning.step_time import GPUS_PER_NODE

WIDTH, FEW = 80, 5
WORTH_SAYING = 0.02
"""share of a step's time that another setting must save to be named"""
HEADINGS = f"{'':4} {'tp':>4} {'pp':>3} {'cp':>2} {'dp':>4} {'recompute':13} {'GiB':>5}  {'step ms':>7} {'tok/s/GPU':>9} {'MFU':>6}"
WORDS = {
    "products": "matrix products of the layers",
    "attention": "attention's core",
    "scan": "Mamba-2's scan and convolution",
    "elementwise": "norms, activations, additions",
    "lm_head": "LM head and loss",
    "recompute": "recomputation",
    "tp_exchange": "exchange of tp",
    "cp_exchange": "exchange of cp",
    "offload": "waiting for host memory",
    "pp_exchange": "exchange of pp",
    "pp_bubble": "pipeline filling and draining",
    "dp_exchange": "exchange of dp, as far as it shows",
    "optimizer": "optimizer, gradients' norm",
    "overhead": "between kernels",
}
"""Terms of `StepTime`, in words."""
SMALL = OptimizerConfig(gradients="bf16", moments="bf16", split_master=True)
SMALL_KEYS = "optimizer.gradients=bf16 optimizer.moments=bf16 optimizer.split_master=true"
CAUTION = (
    "within 20 % of 97 of 101 runs on one and two H200s, median 4 %; the other four waited for their host and took up to 1.9 times as long as "
    "predicted; not measured: pipelines, networks, more than two GPUs (docs/plan.md)"
)
PARTS = ("weights", "gradients", "optimizer", "activations")


@dataclass(frozen=True)
class View:
    """What the texts are about."""

    task: Task
    memory_gib: float | None = None
    tokens: int | None = None
    """of the whole run"""
    price: float | None = None
    """of a GPU-hour"""

    @property
    def model(self) -> ModelConfig:
        """Its shape."""
        return self.task.model

    def fits(self, choice: Choice) -> bool:
        """Whether it does; yes where no memory was said."""
        return self.memory_gib is None or choice.need.fits(self.memory_gib)


def heading(view: View) -> str:
    """GPUs, lengths, and whose rates."""
    task, rates = view.task, view.task.machine.rates
    each = f" of {view.memory_gib:g} GiB" if view.memory_gib is not None else ""
    batch = f"{task.global_batch:,} sequences" if task.global_batch else f"{task.tokens_per_step:,} tokens (or what dp asks for)"
    kind = ("FP8" if task.training.fp8 is not None else "bf16") + (", CUDA graphs" if task.training.cuda_graphs else "")
    lines = [f"{_gpus(task.gpus)}{each}, {task.seq_len:,} tokens a sequence, {batch} a step, {kind}", f"rates    {rates.name}, {rates.note}"]
    if task.gpus > GPUS_PER_NODE:
        lines.append(f"network  {task.machine.network_gbps:g} Gb/s of each GPU between nodes of {GPUS_PER_NODE} (--network-gbps)")
    return fold("\n".join(lines))


def table(view: View, rows: list[tuple[str, Choice]]) -> str:
    """Choices with their marks."""
    days = f" {'run':>10}" if view.tokens is not None else ""
    return "\n".join([HEADINGS + days, *(_row(view, mark, choice) for mark, choice in rows)])


def best_few(view: View, found: Survey, best: Choice, own: Choice | None) -> str:
    """The recipe's own layout, the one to take, and the next few that fit."""
    others = [choice for choice in found.allowed if view.fits(choice) and choice not in (best, own)][: FEW - 1]
    also = "fits" if view.memory_gib is not None else ""
    ranked = sorted([best, *others], key=lambda choice: choice.pace)
    return table(view, [*([("own", own)] if own is not None else []), *(("take" if choice == best else also, choice) for choice in ranked)])


def taken(view: View, best: Choice, found: Survey, own: Choice | None = None) -> str:
    """The overrides of the best, why it, its memory and what the run costs."""
    batch = "" if view.task.global_batch else f" global_batch={best.global_batch}"
    lines = [f"take     {best.overrides}{batch} (the recipe as it is)" if best == own else f"take     {_overrides(view, best)}{batch}"]
    fits = f"; {verdict(best.need, view.memory_gib)}" if view.memory_gib is not None else ""
    lines.append(f"because  {best.reason}{fits}")
    lines += [f"or       {text}" for text in (_fewer_layers(view, best), _overlapped(view, best), _pipeline(view, best, found)) if text]
    lines += [f"memory   {memory_parts(view, best)}"]
    if text := costs(view, best):
        lines.append(text)
    return fold("\n".join(lines))


def _overrides(view: View, choice: Choice) -> str:
    """To paste behind the recipe: what it sets otherwise is turned off."""
    said = choice.overrides
    undone = [f"{key}={off}" for key, off in view.task.undone.items() if not any(word.startswith(f"{key}=") for word in said.split())]
    return " ".join([said, *undone])


def costs(view: View, choice: Choice) -> str:
    """Days, GPU-hours and money of the run's tokens; nothing where they are not known."""
    if view.tokens is None:
        return ""
    run = budget(view.tokens, choice.global_batch * view.task.seq_len, view.task.gpus, choice.step.total)
    return fold(f"budget   {run.describe(view.price)} (training steps alone)")


def memory_parts(view: View, choice: Choice) -> str:
    """GiB of the fullest rank by kind."""
    kinds = ", ".join(f"{part} {getattr(choice.need, part) / 2**30:.1f}" for part in PARTS)
    loss = loss_bytes(choice.plan, view.model, view.task.seq_len, choice.training) / 2**30
    left = f"{MARGIN:.0%} of the GPU is left for buffers of CUDA, NCCL and kernels"
    return f"{kinds} GiB (the loss with its logits, {loss:.1f}, among activations); {left}"


def breakdown(view: View, choice: Choice) -> str:
    """Milliseconds of its step by kind of work."""
    step = choice.step
    found = [(WORDS[term.name], getattr(step, term.name)) for term in fields(step)]
    lines = [f"  {words:36} {1e3 * seconds:10,.1f} ms {seconds / step.total:7.1%}" for words, seconds in found if seconds]
    speed = choice.tokens_per_second(view.task.seq_len)
    mfu = _mfu(view, choice)
    utilised = f", MFU {mfu:.1%}" if mfu is not None else ""
    tflops = _model_flops(view) * speed / 1e12
    lines.append(f"  {'all':36} {1e3 * step.total:10,.1f} ms")
    lines.append(fold(f"         {speed:,.0f} tokens/s and {tflops:.0f} TFLOP/s a GPU{utilised}"))
    return "\n".join(["where its step goes, predicted:", *lines])


def convention(view: View) -> str:
    """What MFU counts."""
    peak = _peak(view)
    if peak is None:
        return ""
    return fold(
        f"MFU      model FLOPs (attention causal, LM head counted, recomputation not) over {peak:g} TFLOP/s, the dense bf16 peak"
        + (", in FP8 too" if view.task.training.fp8 is not None else "")
    )


def legend(view: View) -> str:
    """What the columns and the predictions are."""
    text = "GiB: predicted for the fullest GPU; ! more than may be planned" if view.memory_gib is not None else "GiB: predicted for the fullest GPU"
    return "\n".join(part for part in (fold(text), convention(view), fold(CAUTION)) if part)


def why_not(view: View, found: Survey, best: Choice | None, everything: bool) -> str:
    """Of the other layouts: too large, slower, forbidden; a count and an example of each reason, or every one."""
    large = sorted((choice for choice in found.allowed if not view.fits(choice)), key=lambda choice: choice.need.total)
    fitting = [choice for choice in found.allowed if best and view.fits(choice) and choice != best]
    slower = [choice for choice in fitting if best and choice.pace >= best.pace]
    quicker = [choice for choice in fitting if best and choice.pace < best.pace]
    groups = defaultdict(list)
    for refusal in found.refused:
        groups[_kind(refusal.rule)].append(refusal)
    lines = [f"{len(large):4} too large, the nearest {name(large[0])}: {_too_much(view, large[0])}"] if large else []
    if slower and best:
        lines += [f"{len(slower):4} slower, from {_slower(slower[0], best)} the time ({name(slower[0])}) to {_slower(slower[-1], best)}"]
    lines += [f"{len(quicker):4} predicted quicker, but pipelines, of which none was ever measured: {name(quicker[0])}"] if quicker else []
    lines += [f"{len(group):4} forbidden: {group[0].rule.split(';')[0]}" for group in sorted(groups.values(), key=len, reverse=True)]
    if not everything:
        return "\n".join(["why not the others (--all lists each):", *(fold(line, "     ") for line in lines)]) if lines else ""
    each = [f"  {name(choice)}: {_too_much(view, choice)}" for choice in large]
    each += [f"  {name(choice)}: fits, {_slower(choice, best)} the time" for choice in [*quicker, *slower] if best]
    each += [f"  {_cut(refusal.parallel.model_dump(), refusal.recompute)}: forbidden: {refusal.rule}" for refusal in found.refused]
    return "\n".join(["why not the others:", *(fold(line, "      ") for line in [*lines, *each])])


@dataclass(frozen=True)
class Stage:
    """A training stage of a pipeline, with its own layout."""

    name: str
    view: View
    choice: Choice
    hours: float | None
    """its limit"""


def pipeline(stages: list[Stage], others: list[str]) -> str:
    """The training stages, each on its GPUs; what they take together; and which stages are not predicted."""
    lines = [f"{'stage':12} {'GPUs':>4}  {'layout':25} {'GiB':>5}  {'step ms':>7} {'tok/s/GPU':>9} {'hours':>5} {'max':>4}"]
    seconds, gpu_hours = 0.0, 0.0
    for stage in stages:
        view, choice = stage.view, stage.choice
        assert view.tokens is not None
        run = budget(view.tokens, choice.global_batch * view.task.seq_len, view.task.gpus, choice.step.total)
        seconds, gpu_hours = seconds + run.seconds, gpu_hours + run.gpu_hours
        large, limit = "" if view.fits(choice) else "!", "" if stage.hours is None else f"{stage.hours:g}"
        cells = f"{stage.name:12} {view.task.gpus:>4}  {name(choice):25} {choice.need.total / 2**30:>5.1f}{large:1}"
        cells += f" {1e3 * choice.step.total:>7,.0f} {choice.tokens_per_second(view.task.seq_len):>9,.0f} {run.seconds / 3600:>5.1f} {limit:>4}"
        lines.append(cells.rstrip())
    first = stages[0].view
    cost = f"; {gpu_hours * first.price:,.0f} at {first.price:g} a GPU-hour" if first.price is not None else ""
    lines += ["", fold(f"together {readable_time(seconds)} one after the other, {gpu_hours:,.0f} GPU-hours{cost}")]
    lines += [fold(f"besides  {', '.join(others)}: not predicted")] if others else []
    lines += [
        fold(f"rates    {first.task.machine.rates.name}, {first.task.machine.rates.note}; network {first.task.machine.network_gbps:g} Gb/s a GPU")
    ]
    large = "GiB: predicted for the fullest GPU" + ("; ! more than may be planned" if first.memory_gib is not None else "; --memory says which fit")
    return "\n".join([*lines, fold(large), fold(CAUTION)])


def nothing_fits(view: View, found: Survey) -> str:
    """Why, with the nearest layout and a way out."""
    assert view.memory_gib is not None
    if not found.allowed:
        examples = {_kind(refusal.rule): refusal.rule for refusal in reversed(found.refused)}
        return f"no layout of {_gpus(view.task.gpus)} is allowed; {len(found.refused)} were tried:\n  " + "\n  ".join(examples.values())
    nearest = min([*found.allowed, *offloaded(view.task, found)], key=lambda choice: choice.need.total)
    least = view.task.choice(nearest.plan, replace(nearest.training, optimizer=SMALL)).need.total / 2**30
    smaller = nearest.training.optimizer.state_bytes > SMALL.state_bytes
    states = f", or states of fewer bytes: {SMALL_KEYS} needs {least:.1f} GiB there" if smaller else ""
    return (
        f"nothing fits {_gpus(view.task.gpus)} of {view.memory_gib:g} GiB with {MARGIN:.0%} to spare; the nearest is {name(nearest)}: "
        f"{_too_much(view, nearest)}; take more GPUs, larger ones, or shorter sequences{states}"
    )


def name(choice: Choice) -> str:
    """tp=2 cp=4, recompute full: what sets it apart."""
    again = "full on host" if choice.training.offload_activations else _again(choice)
    return _cut({key: getattr(choice.plan, key) for key in ("tp", "pp", "vpp", "cp")}, again)


def fold(text: str, indent: str = "         ") -> str:
    """Lines of at most 80 columns; what goes on is indented."""
    return "\n".join(
        textwrap.fill(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) if len(line) > WIDTH else line
        for line in text.splitlines()
    )


def _row(view: View, mark: str, choice: Choice) -> str:
    plan, mfu = choice.plan, _mfu(view, choice)
    tp = f"{plan.tp} sp" if plan.sp else str(plan.tp)
    pp = f"{plan.pp}x{plan.vpp}" if plan.vpp else str(plan.pp)
    gib, share = choice.need.total / 2**30, "" if mfu is None else f"{mfu:.1%}"
    large = "" if view.fits(choice) else "!"
    cells = f"{mark:4} {tp:>4} {pp:>3} {plan.cp:>2} {plan.dp:>4} {_again(choice):13} {gib:>5.1f}{large:1} {1e3 * choice.step.total:>7,.0f}"
    cells += f" {choice.tokens_per_second(view.task.seq_len):>9,.0f} {share:>6}"
    if view.tokens is None:
        return cells
    run = budget(view.tokens, choice.global_batch * view.task.seq_len, view.task.gpus, choice.step.total)
    return f"{cells} {readable_time(run.seconds):>10}"


def _again(choice: Choice) -> str:
    layers = choice.training.recompute_layers
    return "but attention" if choice.keep_attention else f"{layers} layers" if layers else choice.recompute or "none"


def _cut(sizes: dict[str, object], again: str | None) -> str:
    cut = " ".join(f"{key}={sizes[key]}" for key in ("tp", "pp", "vpp", "cp") if sizes[key] not in (None, 1)) or "dp alone"
    return cut if again in (None, "none") else f"{cut}, recompute {again}"


def _too_much(view: View, choice: Choice) -> str:
    assert view.memory_gib is not None
    largest = max(PARTS, key=lambda part: getattr(choice.need, part))
    over = choice.need.total / 2**30 - (1 - MARGIN) * view.memory_gib
    return f"{choice.need.total / 2**30:.1f} GiB, {over:.1f} too much, of which {largest} {getattr(choice.need, largest) / 2**30:.1f}"


def _slower(choice: Choice, best: Choice) -> str:
    return f"{choice.pace / best.pace:.2f} x"


def _kind(rule: str) -> str:
    """A rule without its values, so that equal ones are counted together."""
    return re.sub(r"\d[\d,]*", "N", rule.split(";")[0])


def _fewer_layers(view: View, best: Choice) -> str | None:
    """A dense model that recomputes everything often has room to recompute fewer layers."""
    if best.recompute != "full" or best.training.offload_activations or view.model.is_hybrid or view.memory_gib is None:
        return None
    layers = view.model.num_layers // (best.plan.pp * best.plan.num_chunks)
    for count in range(1, layers):
        fewer = view.task.choice(best.plan, replace(best.training, recompute_layers=count), best.tp_comm_overlap)
        if fewer.need.fits(view.memory_gib):
            quicker = 1 - fewer.pace / best.pace
            if quicker < WORTH_SAYING:
                return None
            return f"recompute_layers={count} of {layers} beside it: {fewer.need.total / 2**30:.1f} GiB, {quicker:.0%} less time"
    return None


def _overlapped(view: View, best: Choice) -> str | None:
    """Tensor parallelism's exchanges beside the products."""
    if not best.plan.sp or view.model.is_hybrid:
        return None
    less = 1 - view.task.choice(best.plan, best.training, tp_comm_overlap=True).pace / best.pace
    return f"parallel.tp_comm_overlap=true beside it: {less:.0%} less time" if less >= WORTH_SAYING else None


def _pipeline(view: View, best: Choice, found: Survey) -> str | None:
    """A pipeline that would be quicker, if the prediction holds."""
    quicker = next((choice for choice in found.allowed if view.fits(choice) and choice.pace < best.pace), None)
    if quicker is None or best.plan.pp > 1:
        return None
    less = 1 - quicker.pace / best.pace
    return f"{_overrides(view, quicker)}: {less:.0%} less time is predicted, but no pipeline was ever measured: compare them with `prism bench`"


def _model_flops(view: View) -> float:
    return flops_per_token(view.model, view.task.seq_len)


def _peak(view: View) -> float | None:
    return cost.peak_tflops(f"NVIDIA {view.task.machine.rates.name}")


def _mfu(view: View, choice: Choice) -> float | None:
    peak = _peak(view)
    return None if peak is None else _model_flops(view) * choice.tokens_per_second(view.task.seq_len) / (peak * 1e12)


def _gpus(count: int) -> str:
    return f"{count} GPU" + ("s" if count > 1 else "")
