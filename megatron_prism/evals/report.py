"""The report: one HTML page that needs nothing but itself. Tables, bars, and responses to read, each with its verdict and why.

Owns: what is on the page, which responses (the first samples of the first questions, cut where they are long: the page says so). The page's style and
its one script stand in report_page.py.
"""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_prism.evals import lengths, table
from megatron_prism.evals.registry import Selection, Task
from megatron_prism.evals.report_page import PAGE
from megatron_prism.evals.responses import ResponseFolder

SHOWN_QUESTIONS = 25
SHOWN_SAMPLES = 2
SHOWN_CHARACTERS = 6000
BAR_HEIGHT, BAR_GAP, GROUP_GAP, LABEL_WIDTH, BAR_WIDTH = 16, 3, 18, 230, 420

Results = Mapping[str, Any]


def samples(output: Path, results: Results, tasks: Sequence[tuple[Task, Selection]]) -> list[dict[str, Any]]:
    """The responses that the page shows: of each model and task, the first samples of the first questions."""
    found = []
    for model in results["models"]:
        for task, selection in tasks:
            shown = {question.id: question for question in selection.questions[:SHOWN_QUESTIONS]}
            for record in ResponseFolder(output, model, task.name).read():
                if record["id"] not in shown:
                    break  # questions stand in order: the rest of the file is not read
                if record["sample"] < SHOWN_SAMPLES:
                    found.append({"model": model, "task": task.name, "prompt": task.prompt_for(shown[record["id"]]), **_shown(record)})
    return found


def page(results: Results, shown: Sequence[Mapping[str, Any]]) -> str:
    """The whole page."""
    tasks = list(next(iter(results["models"].values())).get("tasks", {}))
    parts = [_notes(results), _table(results, table.rows(results)), lengths.section(results)]
    if tasks:
        parts += [_section("Accuracy", _bars(results, tasks)), _section("Differences", _differences(results))]
        parts += [_section(task, _table(results, table.details(results, task))) for task in tasks]
    data = json.dumps(list(shown), ensure_ascii=False).replace("<", "\\u003c")
    fields = {"limits": _limits() if shown else "", "body": "\n".join(parts), "data": data}  # the data last: a response may hold any text
    frame = PAGE
    for name, content in fields.items():
        frame = frame.replace(f"{{{{{name}}}}}", content)
    return frame


def _notes(results: Results) -> str:
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in table.summary(results))
    return f'<ul class="notes">{lines}</ul>' if lines else ""


def _section(title: str, content: str) -> str:
    return f"<h2>{html.escape(title)}</h2>\n{content}"


def _table(results: Results, rows: Sequence[table.Row]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in results["models"])
    body = "".join(f"<tr><th>{html.escape(row.label)}</th>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row.cells)}</tr>\n" for row in rows)
    return f"<div class=scroll><table><thead><tr><th></th>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"


def _differences(results: Results) -> str:
    lines = results.get("comparisons", [])
    if not lines:
        return "<p>There is one model.</p>"
    rows = "".join(
        f"<tr><th>{html.escape(line['model'])} less {html.escape(line['against'])}</th><th>{html.escape(line['task'])}</th>"
        f"<td>{100 * line['difference']:+.1f}</td><td>{100 * line['low']:+.1f} to {100 * line['high']:+.1f}</td>"
        f"<td>{'a difference' if line['is_difference'] else 'not told apart'}</td></tr>\n"
        for line in lines
    )
    head = "<tr><th></th><th>task</th><th>points</th><th>95 % interval</th><th></th></tr>"
    return f"<div class=scroll><table><thead>{head}</thead><tbody>\n{rows}</tbody></table></div>"


def _bars(results: Results, tasks: Sequence[str]) -> str:
    """Horizontal bars, a group a task, a bar a model, with whiskers of one standard error."""
    parts, y = [], 0
    for task in tasks:
        parts.append(f'<text x="{LABEL_WIDTH - 8}" y="{y + BAR_HEIGHT - 3}" text-anchor="end" class="task">{html.escape(task)}</text>')
        for place, (name, model) in enumerate(results["models"].items()):
            parts.append(_bar(name, model["tasks"][task], place, y))
            y += BAR_HEIGHT + BAR_GAP
        y += GROUP_GAP
    width = LABEL_WIDTH + BAR_WIDTH + 170
    return f'<svg viewBox="0 0 {width} {y}" width="{width}" height="{y}" role="img" aria-label="accuracy by task and model">{"".join(parts)}</svg>'


def _bar(name: str, found: Mapping[str, Any], place: int, y: int) -> str:
    length, middle = BAR_WIDTH * found["accuracy"], y + BAR_HEIGHT / 2
    low, high = (BAR_WIDTH * min(1, max(0, found["accuracy"] + sign * found["standard_error"])) for sign in (-1, 1))
    text = f"{100 * found['accuracy']:.1f} {name}"
    return (
        f'<rect x="{LABEL_WIDTH}" y="{y}" width="{length:.1f}" height="{BAR_HEIGHT}" class="c{place % 6}"/>'
        f'<line x1="{LABEL_WIDTH + low:.1f}" x2="{LABEL_WIDTH + high:.1f}" y1="{middle}" y2="{middle}" class="whisker"/>'
        f'<text x="{LABEL_WIDTH + max(length, high) + 6:.1f}" y="{y + BAR_HEIGHT - 4}">{html.escape(text)}</text>'
    )


def _shown(record: Mapping[str, Any]) -> dict[str, Any]:
    text = record["text"]
    cut = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}\n[... {len(text) - SHOWN_CHARACTERS} more characters]"
    kept = {key: record[key] for key in ("id", "sample", "reason", "answer", "detail", "num_tokens", "finish_reason")}
    return {**kept, "text": cut}


def _limits() -> str:
    return (
        f"The first {SHOWN_SAMPLES} samples of the first {SHOWN_QUESTIONS} questions of each task, {SHOWN_CHARACTERS} characters of each; "
        "all of them are in responses/MODEL/TASK.jsonl.zst."
    )
