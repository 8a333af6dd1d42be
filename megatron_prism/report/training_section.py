"""The report's section on training: loss, held-out loss, learning rate, gradient norm, speed, and what happened on the way."""

from collections.abc import Callable, Sequence
from datetime import datetime
from statistics import median
from typing import Any, NamedTuple

from megatron_prism.report import parts
from megatron_prism.report.chart import Mark
from megatron_prism.report.curves import Curve, of_lines
from megatron_prism.report.data_section import plans
from megatron_prism.report.parts import Cell
from megatron_prism.report.runs import Artifact
from megatron_prism.report.scales import Axis, number

RUNS = ("train", "extend")
POINTS = 9000
"""of a figure, over all of its curves"""


class Log(NamedTuple):
    """A run and the lines of its log."""

    run: Artifact
    lines: list[dict[str, Any]]

    @property
    def training(self) -> list[dict[str, Any]]:
        """The lines of training steps."""
        return [line for line in self.lines if "loss" in line]

    @property
    def placed(self) -> list[dict[str, Any]]:
        """All lines, those of validations and evaluations with the tokens of their step."""
        tokens = {line["step"]: line["tokens"] for line in self.lines if "tokens" in line}
        return [{"tokens": tokens[line["step"]], **line} for line in self.lines if line["step"] in tokens]


class Panel(NamedTuple):
    """A figure of all runs: a key of their lines."""

    title: str
    key: str
    label: str
    scale: Callable[[Log], float] = lambda log: 1.0
    log: bool = False
    from_zero: bool = False
    caption: str = ""


PANELS = (
    Panel("Training loss", "loss", "loss, nats a token", caption="The mean over the unmasked tokens of a global batch."),
    Panel("Held-out loss", "validation/loss", "loss, nats a token"),
    Panel("Score inside training", "evaluation/score", "mean accuracy, %", scale=lambda log: 100.0),
    Panel("Learning rate", "lr", "learning rate", from_zero=True),
    Panel("Gradient norm", "grad_norm", "gradient norm", log=True, caption="Before clipping."),
    Panel("Throughput", "tokens_per_second", "tokens/s/rank", scale=lambda log: 1 / ranks(log.run), from_zero=True),
    Panel("Model FLOP/s", "tflops_per_rank", "TFLOP/s/rank", from_zero=True),
    Panel("MFU", "mfu", "model FLOP/s utilisation, %", scale=lambda log: 100.0, from_zero=True),
)


def section(every: Sequence[Artifact]) -> str:
    """All runs over one axis, then each by source."""
    logs = [log for one in every if one.kind in RUNS and one.is_shown and (log := Log(one, one.lines())).training]
    if not logs:
        return ""
    content = [_table(logs), parts.notes(_events(logs)), _figures(logs), parts.fold("Loss of each source", [_by_source(log) for log in logs])]
    return parts.section("training", "Training", content)


def ranks(one: Artifact) -> int:
    """Processes of the run: a GPU each, or a process on a CPU."""
    return int((one.provenance.get("host") or {}).get("ranks", 1))


def resumes(log: Log) -> list[tuple[int, str]]:
    """The steps after which a run was stopped and taken up again, and when."""
    starts = [session["started_at"] for session in [*log.run.provenance.get("earlier_sessions", []), log.run.provenance] if "started_at" in session]
    found = []
    for start in starts[1:]:
        before = [line["step"] for line in log.lines if line.get("time", 0.0) < datetime.fromisoformat(start).timestamp()]
        found.append((int(before[-1]) if before else 0, start))
    return found


def _figures(logs: Sequence[Log]) -> str:
    """Every panel, by tokens; by steps in a fold."""
    by_tokens = parts.grid(_panel(panel, logs, "tokens", "tokens", place == 0) for place, panel in enumerate(PANELS))
    by_steps = parts.grid(_panel(panel, logs, "step", "steps of the optimizer", place == 0) for place, panel in enumerate(PANELS))
    return by_tokens + parts.fold("The same by steps", [by_steps], printed=False)


def _panel(panel: Panel, logs: Sequence[Log], x: str, x_label: str, marked: bool) -> str:
    limit = max(100, POINTS // len(logs))
    curves: list[Curve] = []
    for log in logs:
        curves.append(of_lines(log.run.name, log.placed, panel.key, x, limit, panel.scale(log)))
    marks = [mark for log in logs for mark in _marks(log, x)] if marked else []
    caption = panel.caption
    if panel.key in ("mfu", "tflops_per_rank"):
        caption = _convention(logs)
    if panel.key == "tokens_per_second":
        caption = (
            "A rank is a GPU."
            if all((log.run.provenance.get("host") or {}).get("gpus") for log in logs)
            else "A rank is a process; without a GPU it is one on a CPU."
        )
    return parts.lines(panel.title, curves, Axis(x_label, whole=True), Axis(panel.label, log=panel.log, from_zero=panel.from_zero), marks, caption)


def _marks(log: Log, x: str) -> list[Mark]:
    found = [(step, "resumed") for step, _ in resumes(log)]
    found += [(record["first_sample"] // int(log.run.config["global_batch"]), "new plan") for record in plans(log.run)[1:]]
    factor = int(log.run.config["global_batch"]) * int(log.run.config["data"]["seq_len"]) if x == "tokens" else 1
    return [Mark(step * factor, text) for step, text in found]


def _convention(logs: Sequence[Log]) -> str:
    said = {line["mfu_convention"] for log in logs for line in log.training if "mfu_convention" in line}
    return (
        f"Convention: {'; '.join(sorted(said))}."
        if said
        else "FLOPs of the model alone: causal attention, recomputation not counted. No MFU: it needs a device whose peak is known."
    )


def _events(logs: Sequence[Log]) -> list[str]:
    found = []
    for log in logs:
        found += [f"{log.run.name}: stopped after step {step:,}, taken up again at {parts.moment(start)}." for step, start in resumes(log)]
        found += [
            f"{log.run.name}: another plan of the data from sample {record['first_sample']:,} on: {'; '.join(record.get('changes', []))}."
            for record in plans(log.run)[1:]
        ]
    return found


def _table(logs: Sequence[Log]) -> str:
    head = ("run", "steps", "tokens", "loss at the end", "held-out loss", "peak rate", "batch x length", "layout", "tokens/s/rank", "took")
    return parts.table(head, [_row(log) for log in logs], "training runs")


def _row(log: Log) -> list[str | Cell]:
    config, lines = log.run.config, log.training
    held_out = [line for line in log.lines if "validation/loss" in line]
    last = [line["loss"] for line in lines[-max(1, len(lines) // 20) :]]
    return [
        log.run.name,
        Cell(f"{lines[-1]['step']:,}", f"of {config['steps']:,}" if lines[-1]["step"] != config["steps"] else ""),
        number(lines[-1]["tokens"]),
        Cell(f"{sum(last) / len(last):.3f}", f"from {lines[0]['loss']:.3f}"),
        f"{held_out[-1]['validation/loss']:.3f}" if held_out else "-",
        number(max(line["lr"] for line in lines)),
        f"{config['global_batch']:,} x {config['data']['seq_len']:,}",
        _layout(log.run),
        number(median(line["tokens_per_second"] for line in lines) / ranks(log.run)),
        Cell(parts.seconds(log.run.seconds), f"last of {log.run.sessions} sessions" if log.run.sessions > 1 else ""),
    ]


def _layout(run: Artifact) -> str:
    sizes = {name: int((run.config.get("parallel") or {}).get(name, 1) or 1) for name in ("tp", "pp", "cp")}
    dp = max(1, ranks(run) // (sizes["tp"] * sizes["pp"] * sizes["cp"]))
    return f"{run.config.get('precision', '')} " + " ".join(
        f"{name}={size}" for name, size in {**sizes, "dp": dp}.items() if size > 1 or name == "dp"
    )


def _by_source(log: Log) -> str:
    figures = []
    for prefix, title in (("loss/", "training loss"), ("validation/loss/", "held-out loss")):
        lines = log.placed
        keys = dict.fromkeys(key for line in lines for key in line if key.startswith(prefix))
        curves = [of_lines(key.removeprefix(prefix), lines, key, "tokens", max(100, POINTS // max(1, len(keys)))) for key in keys]
        figures.append(parts.lines(f"{log.run.name}: {title} by source", curves, Axis("tokens", whole=True), Axis("loss, nats a token")))
    return parts.grid(figures)
