"""The report's section on reinforcement learning: what a run's metrics.jsonl says by step, and responses to read.

What models write is text and nothing else: it is escaped where it stands, and no script touches it. Owns: which curves, and which responses: of the
first and the last kept step the first prompts, of each its best and its worst response, cut where they are long (the page says so).
"""

import html
from collections.abc import Mapping, Sequence
from itertools import accumulate, groupby
from statistics import fmean
from typing import Any, NamedTuple

from megatron_prism.evals.frames import records
from megatron_prism.report import parts
from megatron_prism.report.curves import Curve, of_lines
from megatron_prism.report.parts import Cell
from megatron_prism.report.runs import Artifact
from megatron_prism.report.scales import STEPS, Axis, number

POINTS = 6000
SHOWN_PROMPTS = 6
SHOWN_CHARACTERS = 2500
CLIPPED = "Clipped tokens"
FROM_ZERO = "Solved from zero"
KEPT = "samples/step_????????.jsonl.zst"
Lines = Sequence[Mapping[str, Any]]


class Panel(NamedTuple):
    """A figure. keys: of a line, each as KEY or by domain as KEY/DOMAIN, with what its curve is called."""

    title: str
    keys: Mapping[str, str]
    label: str
    factor: float = 1.0
    log: bool = False
    from_zero: bool = False
    caption: str = ""


PANELS = (
    Panel("Reward", {"reward": ""}, "mean reward", caption="Over all responses of a step; responses whose grading failed are left out."),
    Panel("Pass rate", {"pass_rate": ""}, "right responses, %", 100.0, caption="Sampled at temperature 1, as the policy is."),
    Panel("Solved prompts", {"solved": ""}, "prompts with a right response, %", 100.0),
    Panel("Response length", {"length": "mean", "length_max": "longest"}, "tokens of a response", from_zero=True),
    Panel("Entropy", {"entropy": ""}, "nats a token", caption="Mean -log p of the written tokens: an estimate of the policy's entropy."),
    Panel("KL to the reference", {"kl": ""}, "nats a token", from_zero=True),
    Panel(
        CLIPPED, {"clipped_low": "clipped below", "clipped_high": "clipped above", "capped": "capped"}, "share of tokens, %", 100.0, from_zero=True
    ),
    Panel("Mismatch of trainer and generator", {"mismatch": "mean", "mismatch_max": "largest"}, "|log p - log p|, nats", log=True),
    Panel("Cut off by the limit", {"truncated": ""}, "responses, %", 100.0, from_zero=True),
    Panel("Gradient norm", {"grad_norm": ""}, "gradient norm", log=True),
    Panel("Learning rate", {"lr": ""}, "learning rate", from_zero=True),
)
COMPARED = (
    ("reward", "reward", 1),
    ("right responses, %", "pass_rate", 100),
    ("tokens of a response", "length", 1),
    ("entropy, nats", "entropy", 1),
    ("KL, nats", "kl", 1),
    ("seconds of a step", "seconds_per_step", 1),
)
"""figures of the beginning and the end: name, key, factor"""


def section(every: Sequence[Artifact]) -> str:
    """Every run of reinforcement learning."""
    content = [_run(one) for one in every if one.kind == "rl" and one.is_shown]
    return parts.section("rl", "Reinforcement learning", content)


def _run(one: Artifact) -> str:
    lines = [line for line in one.lines() if "reward" in line]
    if not lines:
        return ""
    figures = [_panel(panel, lines) for panel in PANELS]
    return (
        parts.heading(one.name) + _table(one, lines) + parts.grid([*figures[:3], _from_zero(one, lines), *figures[3:], _times(lines)]) + _samples(one)
    )


def _panel(panel: Panel, lines: Lines) -> str:
    """A line a figure, and of the first one a line a domain: of two figures all domains would be too many to tell apart."""
    names = dict.fromkeys(key for line in lines for key in line)
    first, *others = panel.keys
    keys = [name for name in names if name.partition("/")[0] == first or name in others]
    limit = max(100, POINTS // max(1, len(keys)))
    curves = [of_lines(_named(key, panel), lines, key, "step", limit, panel.factor) for key in keys]
    values = [y for curve in curves for _, y in curve.points]
    if panel.title == CLIPPED and curves and not any(values):
        return parts.figure(panel.title, parts.paragraph("None in any step: the update was on the policy's own responses, where ratios are 1."))
    axis = Axis(panel.label, log=panel.log, from_zero=panel.from_zero)
    return parts.lines(panel.title, curves, STEPS, axis, caption=panel.caption)


def _named(key: str, panel: Panel) -> str:
    """A curve's name: its domain, or what tells it from the panel's other keys."""
    name, _, domain = key.partition("/")
    return " ".join(filter(None, [panel.keys[name], domain])) or "all"


def _from_zero(one: Artifact, lines: Lines) -> str:
    """Prompts that were solved after they had not been, summed up."""
    found = [line for line in lines if "solved_from_zero" in line]
    if found and not any(line["solved_from_zero"] for line in found):
        return parts.figure(
            FROM_ZERO, parts.paragraph(f"None in any step. Only a prompt that is asked a second time can count: {_asked(one, lines)}.")
        )
    sums = accumulate(line["solved_from_zero"] for line in found)
    points = [(float(line["step"]), total) for line, total in zip(found, sums, strict=True)]
    caption = "Prompts with a right response that had none whenever they were asked before; summed over steps."
    return parts.lines(FROM_ZERO, [Curve("all", points, len(points))], STEPS, Axis("prompts so far", from_zero=True), caption=caption)


def _asked(one: Artifact, lines: Lines) -> str:
    """How many prompts were asked, and of how many, where the recipe says."""
    prompts = one.config["prompts"]
    counts = [source.get("count") for source in prompts.get("sources", [])]
    known = f", of at most {sum(counts):,}" if counts and all(isinstance(count, int) for count in counts) else ""
    return f"{lines[-1]['step'] * prompts['prompts_per_step']:,} were asked{known}"


def _times(lines: Lines) -> str:
    """Where a step's time goes."""
    phases = list(dict.fromkeys(key for line in lines for key in line if key.startswith("seconds/")))
    shares = [{"step": line["step"], **{key: 100 * line[key] / line["seconds_per_step"] for key in phases if key in line}} for line in lines]
    curves = [of_lines(key.removeprefix("seconds/"), shares, key, "step", max(100, POINTS // max(1, len(phases)))) for key in phases]
    return parts.lines("Time of a step", curves, STEPS, Axis("share of a step's seconds, %", (0.0, 100.0)))


def _table(one: Artifact, lines: Lines) -> str:
    """What the run asked, and its first against its last tenth."""
    tenth = max(1, len(lines) // 10)
    first, last = lines[:tenth], lines[-tenth:]
    rows: list[list[str | Cell]] = []
    for label, key, factor in COMPARED:
        if all(any(key in line for line in part) for part in (first, last)):
            rows.append([label, *(f"{factor * fmean(line[key] for line in part if key in line):.3g}" for part in (first, last))])
    config = one.config
    prompts, each = config["prompts"]["prompts_per_step"], config["rollout"]["responses_per_prompt"]
    asked = f"{prompts:,} prompts a step, {each} responses each, {number(lines[-1]['responses'])} responses in all"
    rate = number(max(line["lr"] for line in lines))
    steps = f"step {lines[-1]['step']:,} of {config['steps']:,}; learning rate {rate}; {parts.seconds(one.seconds)}"
    head = ("mean over steps", f"{first[0]['step']:,} to {first[-1]['step']:,}", f"{last[0]['step']:,} to {last[-1]['step']:,}")
    return parts.paragraph(f"{asked}; {steps}.") + parts.table(head, rows, f"{one.name}: beginning and end")


def _samples(one: Artifact) -> str:
    paths = sorted(one.folder.glob(KEPT))
    chosen = dict.fromkeys([paths[0], paths[-1]]) if paths else {}
    shown = [_step(path) for path in chosen]
    said = (
        f"The first {SHOWN_PROMPTS} prompts of the first and the last kept step; of each its best and its worst response, "
        f"{SHOWN_CHARACTERS:,} characters of each text."
    )
    return parts.heading(f"{one.name}: responses") + parts.paragraph(said) + "".join(shown) if shown else ""


def _step(path: Any) -> str:
    boxes: list[str] = []
    for _, group in groupby(records(path), key=lambda record: record["id"]):
        if len(boxes) == SHOWN_PROMPTS:
            break
        boxes.append(_prompt(list(group)))
    step = int(path.name.removeprefix("step_").partition(".")[0])
    return f"<h4>Step {step:,}</h4>" + "".join(boxes)


def _prompt(group: Sequence[Mapping[str, Any]]) -> str:
    """A prompt, its best and its worst response."""
    ordered = sorted(group, key=lambda record: -record["reward"])
    picked = [ordered[0]] if len(ordered) == 1 or ordered[0]["reward"] == ordered[-1]["reward"] else [ordered[0], ordered[-1]]
    right = sum(record["why"] == "correct" for record in group)
    summary = f"{group[0]['id']} ({group[0]['domain']}): {right} of {len(group)} right"
    content = "".join(_response(record) for record in picked)
    return f'<details><summary>{html.escape(summary)}</summary><div class="faint">prompt</div>{_text(group[0]["prompt"])}{content}</details>'


def _response(record: Mapping[str, Any]) -> str:
    kind = "correct" if record["why"] == "correct" else "other"
    answer = "none" if record["answer"] is None else record["answer"]
    facts = f"reward {record['reward']:.2f}, advantage {record['advantage']:+.2f}, {record['num_written']} tokens, answer {answer}"
    taken = "".join(f", {name} -{value:.3f}" for name, value in record["penalties"].items())
    why = f'<span class="{kind}">{html.escape(str(record["why"]))}</span>'
    return f'<div class="faint">response {record["sample"]}: {why}; {html.escape(facts + taken)}</div>{_text(record["text"])}'


def _text(text: str) -> str:
    cut = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}\n[... {len(text) - SHOWN_CHARACTERS:,} more characters]"
    return f'<pre tabindex="0">{html.escape(cut)}</pre>'
