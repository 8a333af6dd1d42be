"""What mid-training and RL changed inside SmolLM2-135M: weights, representations, answers, and the scores of merged models; `reinforce.py --inside`.

WORK/inside/analyze, analyze_mid     the three models' weights, with the course of RL; the course of mid-training
WORK/inside/cka                      hidden states on prose and on questions
WORK/inside/drawn, behaviour         several answers drawn to each question; how they changed
WORK/inside/landscape                merged models on the path start - mid - rl; on GPUs also around it
WORK/inside/report/report.html       all of it on one page, with what the models were made from
Each is a stage's own output, made by `prism STAGE` with the recipe that stands in its config.toml; done ones are skipped.
"""

import argparse
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from megatron_prism.stages import analyze, behaviour, cka, evaluate, landscape, report, run_once

TITLE = "SmolLM2-135M: what mid-training and RL changed"


class Size(NamedTuple):
    """How closely it is looked."""

    inputs: int
    """texts of each set, for CKA; a draw of the bootstrap has half of them"""
    max_tokens: int
    questions: int
    """of each kind, for answers and landscape"""
    points: int
    """of each line of the path"""
    grid: dict[str, Any] | None
    """of the landscape; an empty one is the paper's 5 x 5"""


SIZES = {"full": Size(200, 512, 32, 5, {}), "small": Size(40, 128, 4, 3, None), "quick": Size(8, 32, 2, 2, None)}
Recipe = dict[str, Any]


def look(asked: argparse.Namespace, models: dict[str, Path], drawn: Recipe, greedy: Recipe) -> None:
    """Every stage in turn. models: start, mid and rl. drawn, greedy: recipes of `prism evaluate`, with several answers to a question and with one."""
    for stage, recipe in recipes(asked, models, drawn, greedy):
        run_once(stage, recipe)


def recipes(asked: argparse.Namespace, models: dict[str, Path], drawn: Recipe, greedy: Recipe) -> list[tuple[ModuleType, Recipe]]:
    """Each stage with its recipe, in order."""
    size, folder = SIZES[asked.size], asked.work / "inside"
    drawn, greedy = ({**recipe, "tasks": {**recipe["tasks"], "num_questions": size.questions}} for recipe in (drawn, greedy))
    listed = [{"name": name, "path": path} for name, path in models.items()]
    answers = [{"name": name, "evaluation": drawn["output"]} for name in models]
    course = {"models": listed[:1], "series": {"run": models["mid"]}}
    sets = [{"name": name, "builtin": name} for name in ("prose", "tasks")]
    looked: dict[str, tuple[ModuleType, Recipe]] = {
        "analyze": (analyze, {"models": listed, "series": {"run": models["rl"], "start": "mid"}}),
        "analyze_mid": (analyze, course),
        "cka": (cka, {"models": listed, "sets": sets, "inputs": size.inputs, "max_tokens": size.max_tokens, "device": asked.device}),
        "drawn": (evaluate, drawn),
        "behaviour": (behaviour, {"models": answers}),
        "landscape": (landscape, {"base": models["start"], "midtrain": models["mid"], "rl": models["rl"], "path": {"points": size.points}}),
    }
    looked["cka"][1]["bootstrap"] = {"size": size.inputs // 2}
    looked["landscape"][1].update({key: greedy[key] for key in ("tasks", "perplexity", "generation")}, grid=size.grid)
    made = [(stage, {"output": folder / name, **recipe}) for name, (stage, recipe) in looked.items()]
    scores = [asked.work / "scores" / f"{name}_{asked.seeds[0]}" for name in ("start", "mid", "mid_rl")]
    drawing = {"output": folder / "report", "runs": [*scores, *(recipe["output"] for _, recipe in made)], "title": TITLE}
    return [*made, (report, drawing)]
