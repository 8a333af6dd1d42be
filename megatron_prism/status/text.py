"""A status for people: a block of lines for each output, one line for each stage of a chain."""

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import typer

from megatron_prism.status.run import duration
from megatron_prism.status.said import Status

COLOURS = {"finished": "green", "running": "cyan", "starting": "cyan", "stopped": "yellow", "waiting": None, "dead": "red", "failed": "red"}
BAR_WIDTH = 24
INDENT = "  "
LABEL = 12
SHOWN_SCORES = 8
MOST_OF_A_REASON = 160
"""characters, on a stage's line"""


def block(one: Status) -> str:
    """Everything about one output."""
    lines = [_title(one), *(INDENT + f"{label:<{LABEL}}{words}".rstrip() for label, words in _rows(one))]
    widths = [max((len(word) for word in words), default=0) for words in ([part.name for part in one.parts], [part.kind for part in one.parts])]
    return "\n".join([*lines, *(INDENT + _part(part, *widths) for part in one.parts)]) + "\n"


def _title(one: Status) -> str:
    where, words = one.where, []
    if where.get("host"):
        counts = [f"{where[key]} {word}{'s' if where[key] > 1 else ''}" for key, word in (("ranks", "rank"), ("gpus", "GPU")) if where.get(key)]
        words.append(", ".join([f"on {where['host']}", *counts]))
    if where.get("began"):
        words.append(f"since {str(where['began']).replace('T', ' ').replace('+00:00', ' UTC')}")
    if where.get("sessions", 1) > 1:
        words.append(f"session {where['sessions']}")
    state = typer.style(one.state, fg=COLOURS.get(one.state, "red"), bold=True)
    return f"{typer.style(str(one.folder), bold=True)}  {one.kind}  {state}  {', '.join(words)}".rstrip()


def _rows(one: Status) -> Iterator[tuple[str, str]]:
    if one.why:
        yield "why", one.why
    if one.total:
        yield "progress", progress(one)
    yield from _run_rows(one) if one.unit == "steps" else _output_rows(one)
    shown = [alarm for alarm in one.alarms if alarm.what != "error" or one.state != "failed"]  # else it is why
    for number, alarm in enumerate(shown):
        yield (
            "alarms" if not number else "",
            typer.style(f"{alarm.what}" + (f" at step {alarm.step}" if alarm.step is not None else "") + f": {alarm.text}", fg="red"),
        )
    if one.unit == "steps" and not one.alarms:
        yield "alarms", "none"


def _part(part: Status, name_width: int, kind_width: int) -> str:
    state = typer.style(f"{part.state:<10}", fg=COLOURS.get(part.state, "red"))
    words = [f"{part.name:<{name_width}}  {part.kind:<{kind_width}}  {state}"]
    if part.state not in ("finished", "waiting") and part.total:
        words.append(progress(part))
    figure = _one_figure(part)
    words += [figure] if figure else []
    words += [part.why[:MOST_OF_A_REASON]] if part.why and part.state != "running" else []
    words += [typer.style(f"{len(part.alarms)} alarms", fg="red")] if part.alarms else []
    return "  ".join(words).rstrip()


def _one_figure(part: Status) -> str:
    facts = part.facts
    if part.unit == "steps":
        key = "reward" if part.kind == "rl" else "loss"
        return f"{key} {_number(facts[key])}" if key in facts else ""
    return f"{facts['tokens']:,} tokens" if isinstance(facts.get("tokens"), int) else ""


def progress(one: Status) -> str:
    """The bar, the counts, the time that is left."""
    done, total = one.done or 0, one.total or 1
    share = min(1.0, done / total)
    full, empty = ("█", "░") if _draws() else ("#", "-")
    filled = int(share * BAR_WIDTH)
    counts = f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB of input" if one.unit == "bytes of input" else f"{done:,} of {total:,} {one.unit}"
    left = f"  ETA {duration(one.eta_seconds)}" if one.eta_seconds is not None else ""
    return f"{full * filled}{empty * (BAR_WIDTH - filled)} {counts}, {100 * share:.0f} %{left}"


# --- a run -------------------------------------------------------------------------------------------------------------------------------------


def _run_rows(one: Status) -> Iterator[tuple[str, str]]:
    facts = one.facts
    for key in ("reward", "loss") if one.kind == "rl" else ("loss",):
        if key in facts:
            yield key, _with_curve(facts, key)
    for label, name in (("by source", "by_source"), ("by domain", "by_domain")):
        if len(facts.get(name, {})) > 1:
            yield label, _pairs(facts[name])
    if "validation" in facts:
        parts = {key.removeprefix("loss/"): value for key, value in facts["validation"].items() if key.startswith("loss/")}
        yield (
            "validation",
            f"loss {_number(facts['validation']['loss'])} at step {facts['validation']['step']:,}"
            + (f"  ({_pairs(parts)})" if len(parts) > 1 else ""),
        )
    policy = {
        name: facts[key]
        for name, key in (("right", "pass_rate"), ("entropy", "entropy"), ("KL", "kl"), ("mismatch", "mismatch"), ("length", "length"))
        if key in facts
    }
    if policy:
        yield "policy", _pairs(policy)
    if "lr" in facts:
        yield "optimizer", f"lr {facts['lr']:.2e}" + (f"  gradient norm {_number(facts['grad_norm'])}" if "grad_norm" in facts else "")
    yield from _speed_rows(facts)
    yield from _safety_rows(facts)


def _with_curve(facts: dict[str, Any], key: str) -> str:
    curve = facts.get("curve", {})
    words = _number(facts[key])
    if curve.get("of") != key:
        return words
    words += f"  {spark(curve['points'])}" if len(curve["points"]) > 1 else ""
    if curve.get("lines_compared", 0) > 1:
        change = curve["mean_now"] - curve["mean_before"]
        words += f"  {change:+.4f} over the last {curve['lines_compared']} lines"
    return words


def _speed_rows(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    rate = facts.get("tokens_per_second", facts.get("generated_tokens_per_second"))
    if rate is not None:
        kind = "tokens/s" if "tokens_per_second" in facts else "written tokens/s"
        over = f", {facts['mean_tokens_per_second']:,.0f} over the run" if "mean_tokens_per_second" in facts else ""
        step = f", {facts['seconds_per_step']:.3g} s a step" if "seconds_per_step" in facts else ""
        yield "speed", f"{rate:,.0f} {kind} now{over}{step}"
    if "mfu" in facts:
        yield "MFU", f"{100 * facts['mfu']:.1f} % ({facts.get('mfu_convention', 'its convention is not recorded')})"
    elif "tflops_per_rank" in facts:
        yield "compute", f"{facts['tflops_per_rank']:.3g} TFLOP/s a rank (causal attention, no recompute)"
    if "goodput" in facts:
        shares = "  ".join(f"{name} {100 * share:.0f} %" for name, share in facts["shares"].items() if name != "steps")
        yield "goodput", f"{100 * facts['goodput']:.0f} % of {duration(facts['wall_seconds'])} went into steps that count ({shares})"


def _safety_rows(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    saved = facts.get("checkpoint")
    if saved is None:
        yield "checkpoint", "none yet"
    else:
        seconds = f" (saved in {saved['save_seconds']:.1f} s)" if saved["save_seconds"] is not None else ""
        yield "checkpoint", f"step {saved['step']:,}, {duration(saved['age_seconds'])} ago{seconds}"
    if "evaluation" in facts:
        scores = {key: value for key, value in facts["evaluation"].items() if key not in ("step", "seconds") and "/" not in key}
        yield "evaluation", f"step {facts['evaluation']['step']:,}: " + "  ".join(f"{key} {100 * value:.1f} %" for key, value in scores.items())


# --- others ------------------------------------------------------------------------------------------------------------------------------------


def _output_rows(one: Status) -> Iterator[tuple[str, str]]:
    facts = one.facts
    if "documents" in facts:
        yield "data", f"{facts['documents']:,} documents, {facts['tokens']:,} tokens" + ("" if one.state == "finished" else " in finished shards")
    for name, source in facts.get("sources", {}).items():
        yield "", f"{name}: {source['tokens'] or 0:,} tokens, {source['domain']}"
    if facts.get("parts_begun"):
        yield "parts", f"{facts['parts_finished']} finished of {facts['parts_begun']} begun"
    for name, found in facts.get("scores", {}).items():
        tasks = {task: f"{100 * value:.1f} %" for task, value in list(found.get("tasks", {}).items())[:SHOWN_SCORES] if value is not None}
        words = [f"{task} {value}" for task, value in tasks.items()]
        words += [f"perplexity {domain} {value:.3f}" for domain, value in found.get("perplexity", {}).items()]
        yield "scores", f"{name}: {'  '.join(words)}"
    for name, tasks in facts.get("in_work", {}).items():
        yield (
            "in work",
            f"{name}: {', '.join(tasks)}" + (f" ({len(facts['answered'][name])} tasks are answered)" if name in facts["answered"] else ""),
        )


def spark(values: Sequence[float]) -> str:
    """A curve of one line's height."""
    steps = "▁▂▃▄▅▆▇█" if _draws() else "_.-=^"
    low, high = min(values), max(values)
    width = (high - low) or 1.0
    return "".join(steps[min(len(steps) - 1, int((value - low) / width * len(steps)))] for value in values)


def _pairs(values: dict[str, Any]) -> str:
    return "  ".join(f"{name} {_number(value)}" for name, value in values.items())


def _number(value: Any) -> str:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return str(value)
    return f"{value:.4f}" if 0.01 <= abs(value) < 1000 else "0" if value == 0 else f"{value:.3g}"


def _draws() -> bool:
    """Whether standard output can take block characters."""
    return "utf" in (sys.stdout.encoding or "").lower()
