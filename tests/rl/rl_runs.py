"""Small RL runs for tests: a random LLaMA as a checkpoint, prompts whose reward rises at once, and one line to start and read a run."""

import json
from pathlib import Path
from typing import Any

from tiny_hf import make_tiny_model

from megatron_prism.config import load_recipe, validate
from megatron_prism.evals.frames import records
from megatron_prism.rl.recipe import RLConfig
from megatron_prism.stages import convert

NUMBERS = ("reward", "pass_rate", "length", "entropy", "loss", "grad_norm", "kl", "mismatch", "lr", "tokens")


def make_inputs(root: Path, seed: int = 3, **config: Any) -> Path:
    """A checkpoint of a random model in ROOT/start, and ROOT/prompts.jsonl: words to complete, graded by how many of two letters come up.

    config: of the model, where it is to have other sizes.
    """
    make_tiny_model(root / "hf", seed=seed, initializer_range=0.1, **config)
    table = {"direction": "import", "source": str(root / "hf"), "output": str(root / "start")}
    convert.run(validate(table, convert.Config, where="test"))
    words = "the cat sat on the mat one two three four five six".split()
    graded = {"grader": "contains", "extraction": "whole", "entry": {"answers": ["a", "e"], "credit": "all"}}
    asked = [{"id": f"word/{number}", "domain": ("even", "odd")[number % 2], "question": f"{word} {number}:"} for number, word in enumerate(words)]
    return write_prompts(root, [{**line, **graded} for line in asked])


def write_prompts(root: Path, lines: list[dict[str, Any]]) -> Path:
    """ROOT/prompts.jsonl; returns ROOT."""
    (root / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def recipe(root: Path, output: Path, **settings: Any) -> list[str]:
    """Overrides of a tiny fp32 run; settings: `optimizer__lr=1e-2` is `optimizer.lr=0.01`."""
    values: dict[str, Any] = {
        "output": str(output),
        "model.checkpoint": str(root / "start"),
        "prompts.sources": [{"file": str(root / "prompts.jsonl")}],
        "prompts.prompts_per_step": 4,
        "prompts.weights.even": 1.0,
        "prompts.weights.odd": 1.0,
        "rollout.responses_per_prompt": 4,
        "rollout.context": 32,
        "rollout.max_new_tokens": 8,
        "pack_length": 128,
        "reward.format": "off",
        "reward.credit": "score",
        "reward.stop_penalty": None,
        "reward.repetition": None,
        "objective.reference_interval": 2,
        "steps": 4,
        "precision": "fp32",
        "device": "cpu",
        "seed": 5,
        "grading_workers": 1,
        "optimizer.lr": 2e-3,
    }
    values |= {key.replace("__", "."): value for key, value in settings.items()}
    return [f"{key}={_toml(value)}" for key, value in values.items()]


def config(root: Path, output: Path, **settings: Any) -> RLConfig:
    """The recipe, checked."""
    return load_recipe(None, recipe(root, output, **settings), RLConfig)


def lines(run: Path) -> list[dict[str, Any]]:
    """A run's metrics, step by step."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "reward" in line]


def numbers(run: Path) -> list[list[float]]:
    """Of each step, what must be equal in equal runs."""
    return [[line[name] for name in NUMBERS] for line in lines(run)]


def samples(run: Path, step: int) -> list[dict[str, Any]]:
    """What was kept of a step."""
    return list(records(run / "samples" / f"step_{step:08d}.jsonl.zst"))


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join("{" + ", ".join(f"{key} = {json.dumps(item)}" for key, item in one.items()) + "}" for one in value) + "]"
    return "none" if value is None else json.dumps(value)
