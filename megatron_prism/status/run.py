"""A run of training, extension or RL, from its files.

    metrics.jsonl, config.toml, provenance.json, COMPLETE, checkpoints/        of every run
    bad_steps/*.json, watchdog/*                                               what went wrong, where something did
    RUN.failures, RUN.log                                                      beside it: what a launcher keeps

Goodput: of the time since the first session began, the share that went into steps that count. Steps that were taken again after a crash, start-up,
saving, validation, evaluation, and the time between sessions do not. The time ends with the run, or now where it runs, or with its last line.
"""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_prism import artifact
from megatron_prism.status import life, log
from megatron_prism.status.alarms import alarms
from megatron_prism.status.log import Line, number
from megatron_prism.status.said import Alarm, State, Status, table

KINDS = ("train", "extend", "rl")
RECENT = 50
"""lines of steps that the present pace is told from"""
CURVE_POINTS = 40
FIGURES = (
    "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "seconds_per_step", "tflops_per_rank", "mfu", "mfu_convention", "memory_gib", "reward",
    "pass_rate", "entropy", "length", "truncated", "kl", "mismatch", "responses", "generation_share", "generated_tokens_per_second",
    "trained_tokens_per_second",
)  # fmt: skip


def status(folder: Path, provenance: dict[str, Any], config: dict[str, Any], now: float) -> Status:
    """What there is to say. config: its config.toml; one of an older version may lack keys."""
    found = log.read(folder)
    steps = log.steps_of(found.lines)
    one = Status(folder.name, folder, str(provenance.get("kind")), "running", unit="steps")
    one.done, one.total = (int(found.lines[-1]["step"]) if found.lines else 0), _integer(config.get("steps"))
    session = _session(found.lines, time_of(provenance.get("started_at")))
    interval = _integer(table(config, "log").get("interval")) or 1
    one.facts = _figures(steps, found.lines) | _curve(steps, "reward" if one.kind == "rl" else "loss")
    one.facts["checkpoint"] = _checkpoint(folder, found.lines, now)
    limit = life.allowed_silence(_between(steps, session, 1 if one.kind == "rl" else interval), *_interruptions(found.lines))
    one.state, one.why = _state(folder, found, steps, session, limit, now)
    one.where = where(provenance)
    one.facts |= _goodput(folder, provenance, found, steps, one.state, now)
    one.eta_seconds = _eta(one, steps, session, now)
    one.alarms = alarms(folder, session, steps, config)
    if found.broken:
        one.alarms.append(Alarm("log", f"{found.broken} lines of {log.METRICS} cannot be read"))
    return one


# --- its state ---------------------------------------------------------------------------------------------------------------------------------


def _state(folder: Path, found: log.Log, steps: list[Line], session: list[Line], limit: float, now: float) -> tuple[State, str]:
    if artifact.is_complete(folder):
        return "finished", ""
    saved, here = _saved_step(folder), log.steps_of(session)
    behind = session[session.index(here[-1]) + 1 :] if here else session
    if (last := log.newest(behind, "error")) is not None:
        return "failed", str(last["error"]).splitlines()[0]
    if (last := log.newest(behind, "stopped")) is not None:
        return "stopped", f"asked to stop at step {last['step']}: start the same command again to go on"
    beside = [folder.with_name(folder.name + suffix) for suffix in (".log", ".failures")]
    silent = now - max(found.modified or 0.0, life.last_change(folder, beside))
    if silent <= limit:
        return ("running", "") if here else ("starting", "no step of this session is logged yet")
    said = f"nothing was written for {duration(silent)}, it may be silent for {duration(limit)}"
    step = int(steps[-1]["step"]) if steps else 0
    if saved is not None and saved >= step:
        return "stopped", f"{said}; its newest checkpoint has every step that it logged: start the same command again to go on"
    there = f"its newest checkpoint is of step {saved}" if saved is not None else "it has no checkpoint"
    return "dead", f"{said}; {there}, its log ends at step {step}: start the same command again to go on"


def _session(lines: list[Line], started: float | None) -> list[Line]:
    """The lines since the present session began (by the whole second)."""
    return [line for line in lines if started is None or (number(line, "time") or started) >= started]


def _between(steps: list[Line], session: list[Line], interval: int) -> float | None:
    """Seconds between two lines of this session; None before its first step."""
    here = log.steps_of(session)
    if not here:
        return None
    seconds = number(here[-1], "seconds_per_step") or _seconds_of(steps, len(steps) - 1)
    return seconds * interval if seconds else life.SHORTEST_SECONDS


def _interruptions(lines: list[Line]) -> tuple[float, float]:
    """The longest save and the longest evaluation so far, in seconds."""
    saves = [number(line, "checkpoint_seconds") or 0.0 for line in lines if "checkpoint_seconds" in line]
    evaluations = [number(line, "evaluation/seconds") or 0.0 for line in lines if "evaluation/seconds" in line]
    return max(saves, default=0.0), max(evaluations, default=0.0)


def _saved_step(folder: Path) -> int | None:
    steps = [int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_????????") if artifact.is_complete(path)]
    return max(steps, default=None)


# --- its figures -------------------------------------------------------------------------------------------------------------------------------


def _figures(steps: list[Line], lines: list[Line]) -> dict[str, Any]:
    """The newest figures, of each the last line that has it."""
    found: dict[str, Any] = {}
    for key in FIGURES:
        line = log.newest(steps[-RECENT:], key)
        if line is not None:
            found[key] = line[key]
    last = steps[-1] if steps else {}
    found["by_source"] = {key.removeprefix("loss/"): value for key, value in last.items() if key.startswith("loss/")}
    found["by_domain"] = {key.removeprefix("reward/"): value for key, value in last.items() if key.startswith("reward/")}
    for name, key in (("validation", "validation/loss"), ("evaluation", "evaluation/seconds")):
        line = log.newest(lines, key)
        if line is not None:
            scores = {inner.removeprefix(f"{name}/"): value for inner, value in line.items() if inner.startswith(f"{name}/")}
            found[name] = {"step": line["step"], **{inner: value for inner, value in scores.items() if inner.count("/") < 2}}
    return found


def _curve(steps: list[Line], key: str) -> dict[str, Any]:
    """The curve of a run in few points, means of stretches; and how the last lines compare with those before."""
    values = [value for value in (number(line, key) for line in steps) if value is not None and value == value]
    if not values:
        return {}
    width = max(1, -(-len(values) // CURVE_POINTS))
    points = [sum(part) / len(part) for part in (values[start : start + width] for start in range(0, len(values), width))]
    span = min(10, len(values) // 2)
    found: dict[str, Any] = {"curve": {"of": key, "points": points}}
    if span:
        before, after = (sum(part) / span for part in (values[-2 * span : -span], values[-span:]))
        found["curve"] |= {"lines_compared": span, "mean_before": before, "mean_now": after}
    return found


def _seconds_of(steps: list[Line], place: int) -> float | None:
    """Seconds of a step at this line: as it says, else (older logs) from the times of two lines."""
    said = number(steps[place], "seconds_per_step")
    if said is not None or place < 1:
        return said
    passed = (number(steps[place], "time") or 0.0) - (number(steps[place - 1], "time") or 0.0)
    return passed / (steps[place]["step"] - steps[place - 1]["step"]) if passed > 0 else None


def _goodput(folder: Path, provenance: dict[str, Any], found: log.Log, steps: list[Line], state: State, now: float) -> dict[str, Any]:
    """Shares of the time since the run first began, and mean speed within steps."""
    useful = spent = tokens = 0.0
    for place, line in enumerate(steps):
        seconds, count = _seconds_of(steps, place), line["step"] - (steps[place - 1]["step"] if place else max(0, line["step"] - 1))
        useful += count * (seconds or 0.0)
        rate = number(line, "tokens_per_second") or number(line, "generated_tokens_per_second")
        if rate and seconds:
            spent, tokens = spent + count * seconds, tokens + rate * count * seconds
    begun = _first_began(provenance)
    ended = _finished_at(folder) if state == "finished" else now if state in ("running", "starting") else number(_last(found.lines), "time")
    facts: dict[str, Any] = {"mean_tokens_per_second": tokens / spent} if spent else {}
    wall = ended - begun if begun is not None and ended is not None else 0.0
    if wall <= 0 or not steps:
        return facts
    shares = {
        "steps": useful,
        **{key: _sum(found.lines, name) for key, name in (("saving", "checkpoint_seconds"), ("evaluation", "evaluation/seconds"))},
    }
    shares = {key: min(1.0, seconds / wall) for key, seconds in shares.items()}
    return facts | {"wall_seconds": wall, "goodput": shares["steps"], "shares": {**shares, "rest": max(0.0, 1 - sum(shares.values()))}}


def _eta(one: Status, steps: list[Line], session: list[Line], now: float) -> float | None:
    """Seconds to the last step at the pace of this session's last lines, saves and evaluations between them included; of a run that goes on."""
    here = log.steps_of(session)[-RECENT:]
    if one.state != "running" or one.total is None or one.done is None or not here:
        return None
    passed = (number(here[-1], "time") or 0.0) - (number(here[0], "time") or 0.0)
    count = int(here[-1]["step"]) - int(here[0]["step"])
    pace = passed / count if count and passed > 0 else _seconds_of(steps, len(steps) - 1)
    if pace is None:
        return None
    return max(0.0, (one.total - here[-1]["step"]) * pace - max(0.0, now - (number(here[-1], "time") or now)))


def _checkpoint(folder: Path, lines: list[Line], now: float) -> dict[str, Any] | None:
    step = _saved_step(folder)
    if step is None:
        return None
    saved = (folder / "checkpoints" / f"step_{step:08d}" / artifact.COMPLETE).stat().st_mtime
    return {"step": step, "age_seconds": max(0.0, now - saved), "save_seconds": number(log.newest(lines, "checkpoint_seconds"), "checkpoint_seconds")}


def where(provenance: dict[str, Any]) -> dict[str, Any]:
    """Who works on an output, and since when."""
    host = table(provenance, "host")
    earlier = provenance.get("earlier_sessions") or []
    found = {"host": host.get("name"), "ranks": host.get("ranks"), "gpus": len(host.get("gpus") or []), "sessions": 1 + len(earlier)}
    found |= {"began": provenance.get("started_at"), "first_began": (earlier[0] if earlier else provenance).get("started_at")}
    return {key: value for key, value in found.items() if value is not None}


# --- small things ------------------------------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """A time span for people, in two units."""
    whole = max(0, round(seconds))
    for size, unit, below, smaller in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // below:02d} {smaller}"
    return f"{whole} s"


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _sum(lines: list[Line], key: str) -> float:
    return sum(number(line, key) or 0.0 for line in lines if key in line)


def _last(lines: list[Line]) -> Line | None:
    return lines[-1] if lines else None


def time_of(text: Any) -> float | None:
    """A time of a provenance, in seconds; None for what is none."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError):
        return None


def _first_began(provenance: dict[str, Any]) -> float | None:
    earlier = provenance.get("earlier_sessions") or [provenance]
    return time_of(earlier[0].get("started_at"))


def _finished_at(folder: Path) -> float | None:
    return time_of(_json(folder / artifact.COMPLETE).get("finished_at"))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
