"""A small pipeline's folders as its stages leave them, written in a moment: artifacts are real, their figures are made up."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from megatron_prism import artifact
from megatron_prism.config import Block
from megatron_prism.evals.frames import write_all

HOSTILE = "</pre><script>document.title='owned'</script><img src=x onerror=document.title='owned'>"
"""what a model may write"""


class Output(Block):
    """The config of any stage, of which the rest is written by hand."""

    output: Path


def make(folder: Path, kind: str, parents: Sequence[Path] = (), files: dict[str, Any] | None = None, *, finished: bool = True, **config: Any) -> Path:
    """An artifact. files: name -> content; lists become JSON lines, tables JSON."""
    artifact.begin(folder, kind, Output(output=folder), parents)
    artifact.write_atomic(folder / artifact.CONFIG, tomli_w.dumps({"output": str(folder), **config}))
    for name, content in (files or {}).items():
        if isinstance(content, list):
            content = "".join(json.dumps(line) + "\n" for line in content)
        artifact.write_atomic(folder / name, content if isinstance(content, str) else json.dumps(content))
    if finished:
        artifact.complete(folder)
    return folder


def prepared(folder: Path) -> Path:
    """A prep output of two sources."""
    facts = {
        "domain": "math",
        "documents": 10,
        "text_bytes": 5000,
        "held_out_documents": 1,
        "blank": 0,
        "empty": 2,
        "bad": {},
        "dropped": {"short": 3},
    }
    return make(folder, "prep", files={f"{name}/report.json": {"name": name, "tokens": 1000, **facts} for name in ("sums", "prose")})


def training_lines(steps: int, interval: int = 1, start: float = 3.0) -> list[dict[str, Any]]:
    """metrics.jsonl of a run that learns."""
    return [
        {
            "step": step, "loss": start / math.sqrt(step) + 1, "lr": 1e-3, "grad_norm": 1 / step, "tokens": step * 512, "tokens_per_second": 4000.0,
            "tflops_per_rank": 0.01, "loss/sums": 1.0 / step, "time": 1.7e9 + step,
        }
        for step in range(1, steps + 1, interval)
    ]  # fmt: skip


def trained(folder: Path, parents: Sequence[Path] = (), steps: int = 40, *, finished: bool = True, reached: int | None = None) -> Path:
    """A training run that took two sources three to one, with a checkpoint, or one that reached some step so far."""
    last = reached or steps
    lines = [*training_lines(last), {"step": last, "validation/loss": 1.5, "validation/loss/sums": 1.4, "time": 1.7e9 + last}]
    config = {"steps": steps, "global_batch": 4, "data": {"seq_len": 128}, "parallel": {"tp": 1, "pp": 1, "cp": 1}, "precision": "fp32"}
    make(folder, "train", parents, {"metrics.jsonl": lines}, finished=False, **config)
    sources = [{"name": name, "weight": weight, "tokens": 4096, "digest": name} for name, weight in (("sums", 3.0), ("prose", 1.0))]
    artifact.annotate(folder, data_plans=[{"first_sample": 0, "sources": sources}])
    make(folder / "checkpoints" / f"step_{last:08d}", "checkpoint", parents)
    if finished:
        artifact.complete(folder)
    return folder


def policy(folder: Path, parents: Sequence[Path]) -> Path:
    """A run of RL with two domains, whose model writes what would break a careless page."""
    grown = {"reward": 0.1, "reward/math": 0.1, "pass_rate": 0.1, "kl": 0.01, "solved_from_zero": 1.0, "responses": 16, "tokens": 100}
    same = {"reward/code": 0.1, "solved": 0.5, "length": 20.0, "length_max": 30.0, "entropy": 0.2, "clipped_low": 0.0, "clipped_high": 0.01}
    same |= {"capped": 0.0, "mismatch": 1e-7, "mismatch_max": 1e-5, "truncated": 0.0, "grad_norm": 0.3, "lr": 3e-4, "loss": 0.1}
    same |= {"seconds_per_step": 4.0, "seconds/generation": 3.0, "seconds/training": 1.0}
    lines = [{"step": step, **{key: step * value for key, value in grown.items()}, **same, "time": 1.7e9 + step} for step in range(1, 6)]
    config = {"steps": 5, "prompts": {"prompts_per_step": 4}, "rollout": {"responses_per_prompt": 4}}
    make(folder, "rl", parents, {"metrics.jsonl": lines}, finished=False, **config)
    write_all(folder / "samples" / "step_00000005.jsonl.zst", [_response(number) for number in range(4)])
    artifact.complete(folder)
    return folder


def _response(number: int) -> dict[str, Any]:
    right = number == 2
    shown = {"prompt": f"1 + 1 = {HOSTILE}", "text": f"two {HOSTILE}", "why": "correct" if right else HOSTILE, "answer": "2", "num_written": 3}
    return {"id": "sum 1", "domain": "math", "sample": number, "reward": float(right), "advantage": 0.5, "penalties": {"stop": 0.1}, **shown}


def scored(folder: Path, parents: Sequence[Path], names: Sequence[str] = ("base", "midtrained"), tasks: Sequence[str] = ("chain_sum", "gcd")) -> Path:
    """An evaluation."""

    def task(place: int) -> dict[str, Any]:
        accuracy = min(1.0, 0.5 * place)
        return {"domain": "math", "accuracy": accuracy, "standard_error": 0.05 if 0 < accuracy < 1 else 0.0, "num_questions": 100}

    domains = {"math": {"perplexity": 10.0, "bits_per_byte": 1.5}}
    models = {name: {"tasks": {each: task(place) for each in tasks}, "perplexity": {"domains": domains}} for place, name in enumerate(names)}
    averages = {name: {"plain": 0.5, "paper": None} for name in names}
    return make(folder, "evaluate", parents, {"scores.json": {"models": models, "averages": averages}}, tasks={"names": list(tasks)})


def pipeline(root: Path) -> Path:
    """data -> base -> midtrain -> policy, and their scores."""
    data = prepared(root / "data")
    base = trained(root / "base", [data])
    midtrain = trained(root / "midtrain", [base / "checkpoints" / "step_00000040", data])
    policy(root / "rl", [midtrain / "checkpoints" / "step_00000040"])
    scored(root / "evaluate", [base, midtrain])
    return root


def long_names(root: Path) -> Path:
    """More of it: a run with a name that does not fit, one that is not finished, one that is broken, and what is not there."""
    data = prepared(root / "data_that_goes")
    trained(root / "an_unreasonably_long_name_for_a_training_run_that_somebody_gave_it", [data])
    trained(root / "going_on", steps=400, finished=False, reached=30)
    shutil.rmtree(data)
    broken = trained(root / "broken")
    (broken / "metrics.jsonl").write_text("")
    return root
