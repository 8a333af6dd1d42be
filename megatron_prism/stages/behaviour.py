"""Behaviour: stored responses -> how models answer, and what changed. Reads what evaluations and RL have kept; no model is run.

OUTPUT/behaviour.json    every figure
OUTPUT/behaviour.html    one page: tables, pictures, the paper's figures beside ours

A stage of its own beside `analyze`, because it reads responses and not weights: either can be made again without the other.
"""

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prism import artifact
from megatron_prism.analysis.behaviour_recipe import PAPER_TABLE, Config, Plan, check, evaluations

if TYPE_CHECKING:
    from megatron_prism.analysis.behaviour import Drawn
    from megatron_prism.analysis.behaviour_read import Stored

__all__ = ["Config", "dry_run", "parents", "run"]

SCHEMA_VERSION = 1
BINS = 40
"""of the distribution of lengths"""


def parents(cfg: Config) -> list[Path]:
    """The evaluations, the run of RL and the output of its filter."""
    return [*evaluations(cfg), *([cfg.rl.run, cfg.rl.prompts] if cfg.rl else [])]


def dry_run(cfg: Config) -> None:
    """Print what would be read and compared."""
    plan = check(cfg)
    for model in cfg.models:
        print(f"model {model.name}: {model.stored_as} of {model.evaluation}" + (f" (paper: {model.paper})" if model.paper else ""))
    print(f"tasks: {', '.join(plan.tasks)}")
    for start, end in plan.pairs:
        print(f"change {cfg.models[start].name} to {cfg.models[end].name}")
    if cfg.rl is not None:
        print(f"prompts through {cfg.rl.run} by the counts of {cfg.rl.prompts}")


def run(cfg: Config) -> Path:
    """Read, count, compare; returns the finished output folder."""
    plan = check(cfg)
    if artifact.is_current(cfg.output, cfg, parents(cfg)):
        return artifact.left_as_it_is(cfg.output)
    from megatron_prism.analysis import behaviour_page, behaviour_table
    from megatron_prism.evals.progress import progress

    with progress() as watch:
        results = Comparison(cfg, plan, watch).results()
    artifact.begin(cfg.output, "behaviour", cfg, parents(cfg))
    artifact.write_atomic(cfg.output / "behaviour.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    artifact.write_atomic(cfg.output / "behaviour.html", behaviour_page.page(results))
    artifact.complete(cfg.output)
    behaviour_table.show(results)
    print(f"models: {len(cfg.models)}, tasks: {len(plan.tasks)} -> {cfg.output / 'behaviour.html'}")
    return cfg.output


class Comparison:
    """All models' answers, read once, and everything that is said about them."""

    def __init__(self, cfg: Config, plan: Plan, watch: Any) -> None:
        """watch: told of the responses read. Errors: UserError, as reading refuses."""
        from megatron_prism.analysis.behaviour_read import read

        self.cfg, self.plan, self.names = cfg, plan, [model.name for model in cfg.models]
        advance = watch("reading responses", len(cfg.models) * len(plan.tasks), 0)
        self.stored: dict[tuple[int, str], Stored] = {}
        for place, model in enumerate(cfg.models):
            for task in plan.tasks:
                self.stored[place, task] = read(plan.folder(model, task))
                advance(1)
        self.drawn = cache(self._drawn)

    def results(self) -> dict[str, Any]:
        """The content of behaviour.json."""
        from megatron_prism.analysis.behaviour import FIGURES
        from megatron_prism.evals.compare import CONFIDENCE

        rl, notes = self._rl()
        return {
            "schema_version": SCHEMA_VERSION,
            "confidence": CONFIDENCE,
            "resamples": self.cfg.resamples,
            "least_responses": self.cfg.least_responses,
            "figures": list(FIGURES),
            "models": [self._model(place) for place in range(len(self.names))],
            "tasks": self.plan.tasks,
            "rows": [self._row(place, task) for place in range(len(self.names)) for task in self._lines()],
            "pairs": [self._pair(start, end) for start, end in self.plan.pairs],
            "lengths": [self._lengths(task) for task in self.plan.tasks],
            "paper": self._paper(),
            "rl": rl,
            "notes": [*self._notes(), *notes],
        }

    def _lines(self) -> list[str | None]:
        """The tasks, then their mean where there are several."""
        return [*self.plan.tasks, *([None] if len(self.plan.tasks) > 1 else [])]

    def _model(self, place: int) -> dict[str, Any]:
        model = self.cfg.models[place]
        scored = json.loads((model.evaluation / "scores.json").read_text(encoding="utf-8"))["models"].get(model.stored_as, {})
        return {
            "name": model.name,
            "evaluation": str(model.evaluation),
            "entry": model.stored_as,
            "fingerprint": scored.get("fingerprint"),
            "paper": model.paper,
        }

    def _row(self, place: int, task: str | None) -> dict[str, Any]:
        from megatron_prism.analysis.behaviour import FIGURES, figure, mean_over

        tasks = self.plan.tasks if task is None else [task]
        sides = [self.stored[place, name].answers for name in tasks]
        drawn = mean_over([self.drawn(place, name, answers.questions) for name, answers in zip(tasks, sides, strict=True)])
        samples = {int(count) for answers in sides for count in answers.samples_q}
        return {
            "model": self.names[place],
            "task": task,
            "questions": sum(len(answers.questions) for answers in sides),
            "samples": samples.pop() if len(samples) == 1 else None,
            "responses": sum(len(answers.question_r) for answers in sides),
            "correct_responses": sum(int(answers.correct_r.sum()) for answers in sides),
            "figures": {name: figure(drawn[name]) for name in FIGURES},
        }

    def _pair(self, start: int, end: int) -> dict[str, Any]:
        from megatron_prism.analysis.behaviour import FIGURES, difference, mean_over
        from megatron_prism.analysis.behaviour_read import common_questions

        rows: list[dict[str, Any]] = []
        sides = []
        for task in self.plan.tasks:
            before, after = self.stored[start, task], self.stored[end, task]
            common = tuple(common_questions(task, (self.names[start], before), (self.names[end], after)))
            sides.append((self.drawn(start, task, common), self.drawn(end, task, common)))
            left_out = [len(side.answers.questions) - len(common) for side in (before, after)]
            figures = {name: difference(sides[-1][0][name], sides[-1][1][name]) for name in FIGURES}
            moved = self._transitions(task, start, end, common)
            rows.append({"task": task, "questions": len(common), "left_out": left_out, "figures": figures, "transitions": moved})
        if len(rows) > 1:
            one, other = (mean_over(drawn) for drawn in zip(*sides, strict=True))
            left_out = [sum(row["left_out"][side] for row in rows) for side in (0, 1)]
            figures = {name: difference(one[name], other[name]) for name in FIGURES}
            questions = sum(row["questions"] for row in rows)
            rows.append({"task": None, "questions": questions, "left_out": left_out, "figures": figures, "transitions": None})
        return {"start": self.names[start], "end": self.names[end], "rows": rows}

    def _transitions(self, task: str, start: int, end: int, common: tuple[str, ...]) -> dict[str, Any]:
        from megatron_prism.analysis.transitions import transitions

        stored = [self.stored[place, task] for place in (start, end)]
        sides = (side.answers.only(common) for side in stored)
        counted = [zip(side.right_q.tolist(), side.samples_q.tolist(), strict=True) for side in sides]
        before, after = (dict(zip(common, counts, strict=True)) for counts in counted)
        return transitions(before, after, is_random=all(side.temperature != 0 for side in stored))

    def _drawn(self, place: int, task: str, questions: tuple[str, ...]) -> "Drawn":
        """A model's figures on some questions of a task, drawn again; the same questions are drawn for every model."""
        import zlib

        from megatron_prism.analysis.behaviour import resampled

        answers = self.stored[place, task].answers.only(questions)
        return resampled(answers, self.cfg.resamples, [self.cfg.seed, zlib.crc32(task.encode())], self.cfg.least_responses)

    def _lengths(self, task: str) -> dict[str, Any]:
        from megatron_prism.analysis.behaviour import length_histogram

        edges, counts = length_histogram({name: self.stored[place, task].answers for place, name in enumerate(self.names)}, BINS)
        return {"task": task, "edges": edges, "counts": counts}

    def _paper(self) -> dict[str, Any] | None:
        from megatron_prism.analysis.behaviour import FIGURES
        from megatron_prism.evals.reference import load_table

        asked = [model for model in self.cfg.models if model.paper is not None]
        if not asked:
            return None
        table = load_table(PAPER_TABLE)
        rows = {}
        for model in asked:
            found = table.row(model.paper or "")
            rows[model.name] = dict(zip(FIGURES, found.values(), strict=True)) | {"pass_rate": (found["pass"] or 0.0) / 100}
        return {"table": table.id, "task": self.cfg.paper_task, "rows": rows, "caveats": list(table.caveats)}

    def _rl(self) -> tuple[dict[str, Any] | None, list[str]]:
        """The course of hard prompts through RL, and what has to be said beside it."""
        from megatron_prism.analysis.behaviour_read import check_counted, read_filter, read_kept
        from megatron_prism.analysis.transitions import course

        asked = self.cfg.rl
        if asked is None:
            return None, []
        filtered, kept = read_filter(asked.prompts), read_kept(asked.run)
        uncounted = check_counted(asked.run, kept, asked.prompts, filtered)
        curves = course(filtered, kept, asked.at_most, asked.window, self.cfg.resamples)
        samples = max(found.samples for found in filtered.values())
        found = {"run": str(asked.run), "prompts": str(asked.prompts), "samples": samples, "steps": [step.step for step in kept], "curves": curves}
        return found, [f"RL asked {uncounted} prompts that the filter did not count; they are in no curve."] if uncounted else []

    def _notes(self) -> list[str]:
        import numpy as np

        from megatron_prism.analysis.behaviour_read import drawn_otherwise, without_chance

        bare = [f"{self.names[place]} on {task}" for (place, task), side in self.stored.items() if np.isnan(side.answers.logprob_r).any()]
        missing = [f"Responses without stored log-probabilities: {', '.join(bare)}; those figures are -."] if bare else []
        by_task = {task: [(name, self.stored[place, task]) for place, name in enumerate(self.names)] for task in self.plan.tasks}
        said = [drawn_otherwise(task, stored) for task, stored in by_task.items()]
        said += [without_chance(task, stored) for task, stored in by_task.items() if self.plan.pairs]
        return [*missing, *(line for lines in said for line in lines)]
