"""The page: its order, its head and foot, and what it says at a glance. One HTML file that needs nothing but itself, and may load nothing.

A section that cannot be drawn, because a file is not what its stage writes, says so with the reason, and the others stand.
"""

import html
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial

from megatron_prism import __version__
from megatron_prism.errors import UserError
from megatron_prism.report import (
    data_section,
    evaluation_section,
    inside_sections,
    models_section,
    origins,
    paper,
    parts,
    rl_section,
    training_section,
    weights_section,
)
from megatron_prism.report.runs import RUN_KINDS, Artifact
from megatron_prism.report.scales import number
from megatron_prism.report.style import POLICY, SCRIPT, STYLE

GENERATOR = '<meta name="generator" content="prism report">'
"""tells a report from any other file"""
SHORT = {"models": "Merging", "rl": "RL", "weights": "Weights"}
"""titles in the list of contents"""
NO_BREAK = "\N{NO-BREAK SPACE}"
MOST_SCORES = 4
"""models whose scores are all told at a glance"""
BROKEN = (UserError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError)
"""what a file raises that is not what its stage writes"""


def page(every: Sequence[Artifact], title: str, paper_model: str | None) -> str:
    """The whole page. every: as from `runs.gather`. paper_model: the paper's name of the model; None: told from the shape. Errors: UserError."""
    model = paper.model_of(every, paper_model)
    drawers: dict[str, Callable[[], str]] = {
        "lineage": partial(origins.section, every),
        "data": partial(data_section.section, every),
        "training": partial(training_section.section, every),
        "models": partial(models_section.section, every),
        "rl": partial(rl_section.section, every),
        "evaluation": partial(evaluation_section.section, every, model),
        "weights": partial(weights_section.section, every),
        **{name: partial(draw, every) for name, draw in inside_sections.SECTIONS.items()},
        "provenance": partial(origins.provenance, every),
    }
    drawn = [_guarded(name, draw) for name, draw in drawers.items()]
    body = "\n".join([_head(every, title), _navigation(drawn), *drawn, _foot()])
    return _FRAME.format(title=html.escape(title), policy=POLICY, generator=GENERATOR, style=STYLE, body=body, script=SCRIPT)


def _guarded(name: str, draw: Callable[[], str]) -> str:
    try:
        return draw()
    except BROKEN as error:
        what = f"{type(error).__name__}: {error}"
        return parts.section(
            name, name.capitalize(), [parts.warning([f"This section cannot be drawn: a file is not what its stage writes ({what})."])]
        )


def _head(every: Sequence[Artifact], title: str) -> str:
    made = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    states = {state: sum(one.state == state for one in every) for state in ("finished", "unfinished", "unreadable", "missing")}
    shown = ", ".join(f"{count} {state}" for state, count in states.items() if count)
    cards = "".join(f"<li><b>{html.escape(figure)}</b><span>{html.escape(text)}</span></li>" for figure, text in _cards(every))
    return f'<header class="top"><h1>{html.escape(title)}</h1><p>{len(every)} artifacts: {shown}. Report of {made}.</p></header>\n' + (
        f'<ul class="cards">{cards}</ul>' if cards else ""
    )


def _cards(every: Sequence[Artifact]) -> list[tuple[str, str]]:
    """What there is, in numbers. A file that cannot be read has none."""
    runs = []
    for one in every:
        if one.is_shown and one.kind in RUN_KINDS:
            try:
                runs.append((one, one.lines()))
            except BROKEN:
                continue
    trained = [
        lines[-1]
        for one, lines in ((one, [line for line in lines if "loss" in line and "tokens" in line]) for one, lines in runs if one.kind != "rl")
        if lines
    ]
    answered = [line["responses"] for one, lines in runs if one.kind == "rl" for line in lines[-2:] if "responses" in line]
    scores = _asked_alike(evaluation_section.in_order(every))
    seconds = [one.seconds for one in every if one.state == "finished" and one.seconds is not None]
    found = []
    if trained:
        found.append((number(sum(line["tokens"] for line in trained)), f"tokens trained on, in {len(trained)} run{'s' * (len(trained) > 1)}"))
    if answered:
        found.append((number(max(answered)), "responses graded in RL"))
    if len(scores) > 1:
        found.append(_course(scores))
    if seconds:
        found.append((parts.seconds(sum(seconds)), f"in {len(seconds)} finished stages"))
    return found


def _course(scores: Sequence[tuple[str, float]]) -> tuple[str, str]:
    """The scores of models in their order; of many the first, the lowest, the highest and the last, so that no fall is hidden."""
    places = range(len(scores))
    ends = {0, min(places, key=lambda place: scores[place][1]), max(places, key=lambda place: scores[place][1]), len(scores) - 1}
    shown = [scores[place] for place in (places if len(scores) <= MOST_SCORES else sorted(ends))]
    few = f" ({len(shown)} of {len(scores)} models: the ends, the lowest, the highest)" if len(shown) < len(scores) else ""
    return f"{' → '.join(f'{100 * score:.1f}' for _, score in shown)}{NO_BREAK}%", f"mean accuracy, {' → '.join(name for name, _ in shown)}{few}"


def _asked_alike(evaluations: Sequence[Artifact]) -> list[tuple[str, float]]:
    """The scores that can be told in one breath: of the evaluations that asked the same in the same way, where most models were."""
    groups: list[tuple[evaluation_section.Figures, list[tuple[str, float]]]] = []
    for one in evaluations:
        asked = evaluation_section.asked(one)
        found = next((scores for settings, scores in groups if settings == asked), None)
        if found is None:
            groups.append((asked, found := []))
        found += _means(one)
    return max((scores for _, scores in groups), key=len, default=[])


def _means(one: Artifact) -> list[tuple[str, float]]:
    """The mean accuracy of each model of an evaluation."""
    try:
        averages = one.read_json("scores.json").get("averages", {})
        return [(name, float(found["plain"])) for name, found in averages.items()]
    except BROKEN:
        return []


def _navigation(drawn: Sequence[str]) -> str:
    found = [match for content in drawn if (match := re.match(r'<section><h2 id="([a-z]+)">([^<]+)</h2>', content))]
    links = "".join(f'<a href="#{match[1]}">{SHORT.get(match[1], match[2])}</a>' for match in found)
    button = '<button type="button" id="theme" aria-label="change between light and dark">Dark</button>'
    return f'<nav aria-label="contents"><div>{links}</div>{button}</nav>'


def _foot() -> str:
    return (
        f"<footer>megatron-prism {html.escape(__version__)}, prism report. One file: nothing is loaded from anywhere. Point at a "
        "curve, or focus it and press the arrow keys, to read values. PRISM is arXiv 2603.17074.</footer>"
    )


_FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
{generator}
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}
<script>
{script}</script>
</body>
</html>
"""
