"""Responses to be read: all of a kept step as records on disk, and one HTML page of the run that needs nothing but itself.

    OUTPUT/samples/step_00000020.jsonl.zst    every response of that step: prompt, text, reward and why
    OUTPUT/report.html                        curves of the run; prompts with their responses, by step, domain and outcome

What models write is data: it stands in the page as JSON, and the page's script sets it as text. Owns: what is kept, what the page shows. Refuses:
nothing; a step that is written again replaces its file. Called on rank 0; no torch here.
"""

import html
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_prism.artifact import write_atomic
from megatron_prism.evals.chart import Axes, Point, lines
from megatron_prism.evals.frames import records, write_all
from megatron_prism.evals.report_page import SCRIPT, STYLE
from megatron_prism.rl.records import Response, Reward
from megatron_prism.rl.rollouts import Group

FOLDER, PAGE_FILE = "samples", "report.html"
SHOWN_CHARACTERS = 6000
CURVES = {"reward": "reward", "pass_rate": "share of right responses", "length": "tokens of a response", "entropy": "entropy, nats", "kl": "KL, nats"}
Decode = Callable[[Sequence[int]], str]


def keep(run: Path, step: int, groups: Sequence[Group], advantages: Sequence[Sequence[float]], decode: Decode) -> Path:
    """Write down all responses of a step. decode: a prompt's tokens as text, special tokens and all."""
    path = run / FOLDER / f"step_{step:08d}.jsonl.zst"
    write_all(path, (record for group, row in zip(groups, advantages, strict=True) for record in _records(step, group, row, decode)))
    return path


def drop_after(run: Path, step: int) -> None:
    """Remove what was kept of steps that a resumed run takes again."""
    for path in (run / FOLDER).glob("step_????????.jsonl.zst"):
        if _step_of(path) > step:
            path.unlink()


def why(reward: Reward) -> str:
    """What decided a reward, in a word or two."""
    if reward.failed:
        return "grading failed"
    if not reward.passed_format:
        return "format"
    return reward.verdict.reason.replace("_", " ") if reward.verdict is not None else "not graded"


def write_page(run: Path, metrics: Sequence[Mapping[str, Any]], shown_steps: int, shown_prompts: int) -> Path:
    """The page, from the run's metrics and its kept steps."""
    paths = sorted((run / FOLDER).glob("step_????????.jsonl.zst"), key=_step_of)[-shown_steps:]
    shown = [record for path in paths for record in _first_prompts(records(path), shown_prompts)]
    data = json.dumps(shown, ensure_ascii=False).replace("<", "\\u003c")
    fields = {"title": html.escape(run.name), "style": STYLE, "script": SCRIPT, "curves": _curves(metrics)}
    fields |= {"limits": _limits(shown_prompts, shown_steps), "data": data}
    page = PAGE
    for name, content in fields.items():  # the data last: a response may hold any text
        page = page.replace(f"{{{{{name}}}}}", content)
    write_atomic(run / PAGE_FILE, page.encode("utf-8", errors="replace"))
    return run / PAGE_FILE


def _records(step: int, group: Group, advantages: Sequence[float], decode: Decode) -> Iterable[dict[str, Any]]:
    prompt = decode(group.prompt.tokens)
    for response, reward, advantage in zip(group.responses, group.rewards, advantages, strict=True):
        yield {"step": step, "id": group.prompt.id, "domain": group.prompt.domain, "prompt": prompt, **_of(response), **_worth(reward, advantage)}


def _of(response: Response) -> dict[str, Any]:
    return {
        "sample": response.sample,
        "text": response.text,
        "tokens": list(response.tokens),
        "num_written": sum(response.written),
        "finish_reason": response.finish_reason,
        "weights_version": response.weights_version,
        "logprob": sum(response.logprobs),
    }


def _worth(reward: Reward, advantage: float) -> dict[str, Any]:
    verdict = reward.verdict
    return {
        "reward": reward.value,
        "why": why(reward),
        "answer": verdict.answer if verdict is not None else None,
        "detail": verdict.detail if verdict is not None else None,
        "penalties": {name: value for name, value in reward.penalties.items() if value},
        "advantage": advantage,
    }


def _first_prompts(found: Iterable[dict[str, Any]], count: int) -> Iterable[dict[str, Any]]:
    seen: set[str] = set()
    for record in found:
        seen.add(record["id"])
        if len(seen) > count:
            return
        yield {**{key: value for key, value in record.items() if key != "tokens"}, "text": _cut(record["text"]), "prompt": _cut(record["prompt"])}


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}\n[... {len(text) - SHOWN_CHARACTERS} more characters]"


def _curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    """A chart for each figure; of rewards and passes one line a domain where there are several."""
    if len(metrics) < 2:
        return ""
    ends = [metrics[0]["step"], metrics[-1]["step"]]
    charts, known = [], dict.fromkeys(key for line in metrics for key in line)  # a step without an update lacks some
    for name, label in CURVES.items():
        keys = [key for key in known if key == name or key.startswith(f"{name}/")]
        series = {key.removeprefix(f"{name}/"): [Point(line["step"], line[key]) for line in metrics if key in line] for key in keys}
        if series:
            charts.append(lines(series, Axes("step", label, [(end, str(end)) for end in ends])))
    return "\n".join(charts)


def _limits(shown_prompts: int, shown_steps: int) -> str:
    return (
        f"The first {shown_prompts} prompts of each of the last {shown_steps} kept steps with all their responses, {SHOWN_CHARACTERS} characters "
        f"of each; all responses of the kept steps are in {FOLDER}/."
    )


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_").partition(".")[0])


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{title}}</title>
<style>
{{style}}</style>
</head>
<body>
<h1>{{title}}</h1>
{{curves}}
<h2>Responses</h2>
<p class="faint">{{limits}}</p>
<div class="choose"><select id="step"></select><select id="domain"></select><select id="why"></select></div>
<div id="list"></div>
<script type="application/json" id="data">{{data}}</script>
<script>
{{script}}fill("step", [...new Set(data.map((one) => one.step))].reverse());
fill("domain", ["every domain", ...new Set(data.map((one) => one.domain))]);
fill("why", ["every outcome", ...new Set(data.map((one) => one.why))]);
const signed = (value) => (value < 0 ? "" : "+") + value.toFixed(2);
function show() {
  pick("list").replaceChildren();
  let last = null;
  for (const one of data) {
    if (String(one.step) !== pick("step").value) continue;
    if (pick("domain").selectedIndex && one.domain !== pick("domain").value) continue;
    if (pick("why").selectedIndex && one.why !== pick("why").value) continue;
    if (one.id !== last) {
      put(pick("list"), "h3", `${one.id} (${one.domain})`);
      put(pick("list"), "pre", one.prompt);
      last = one.id;
    }
    const box = put(pick("list"), "details", "");
    const head = put(box, "summary", `${one.sample}: reward ${one.reward.toFixed(2)}, advantage ${signed(one.advantage)}, `);
    put(head, "span", one.why, one.why === "correct" ? "correct" : "other");
    const end = one.finish_reason === "length" ? ", cut off" : "";
    put(head, "span", ` (answer ${one.answer ?? "none"}; ${one.num_written} tokens${end}; weights of step ${one.weights_version})`, "faint");
    put(box, "pre", one.text);
    for (const [name, value] of Object.entries(one.penalties)) put(box, "div", `${name}: -${value.toFixed(3)}`, "faint");
    if (one.detail) put(box, "div", one.detail, "faint");
  }
}
for (const id of ["step", "domain", "why"]) pick(id).onchange = show;
show();
</script>
</body>
</html>
"""
