"""Evaluate: models -> scores. Perplexity by domain on held-out shards, accuracy on held-out tasks, for models side by side or for a run's checkpoints
as they become complete.

OUTPUT/scores.json                           every figure
OUTPUT/table.md                              the table that is printed
OUTPUT/report.html                           one page: tables, bars, responses to read
OUTPUT/responses/MODEL/TASK.jsonl.zst        every response with its verdict

Runs in one process or on many (RANK, WORLD_SIZE): each draws its share, rank 0 joins. Stopped in any way, it goes on where it was.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prism import artifact
from megatron_prism.config import config_hash
from megatron_prism.errors import UserError
from megatron_prism.evals.models import find_model
from megatron_prism.evals.ranks import Ranks
from megatron_prism.evals.recipe import EvaluateConfig, PerplexityConfig, parents, sampling_of, tasks_of

if TYPE_CHECKING:
    from megatron_prism.evals.evaluation import Evaluation
    from megatron_prism.evals.perplexity import HeldOut

__all__ = ["Config", "dry_run", "parents", "run"]

Config = EvaluateConfig
SCHEMA_VERSION = 2
"""2: graded responses are compressed; standard scores beside accuracy"""


def dry_run(cfg: EvaluateConfig) -> None:
    """Print what would be scored, on what."""
    for model in cfg.models:
        print(f"model {model.name}: {find_model(model.path)}")
    if cfg.follow is not None:
        print(f"models step_N: the checkpoints of {cfg.follow.run}, until it is finished")
    for part in _held_out(cfg.perplexity):
        print(f"perplexity on {part.source} ({part.domain}): {sum(len(window) - 1 for window in part.windows)} tokens")
    for task in tasks_of(cfg):
        questions = min(task.num_questions, _limit(cfg) or task.num_questions)
        sampling = sampling_of(cfg, task)
        how = "greedy" if sampling.temperature == 0 else f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}"
        print(f"task {task.name}: {questions} questions, {sampling.n} completions each ({how}, up to {sampling.max_new_tokens} tokens)")


def run(cfg: EvaluateConfig) -> Path:
    """Score every model, on every rank of the launch; returns the output folder, which rank 0 finishes."""
    ranks = Ranks.of_environment(cfg.output, cfg.patience_seconds)
    asked = cfg.model_copy(update={"regrade": False})
    tasks_of(cfg)
    for model in cfg.models:
        find_model(model.path)
    from megatron_prism.evals.evaluation import is_as_scored
    from megatron_prism.evals.frames import named_disk_full
    from megatron_prism.evals.responses import reopen_shares

    if artifact.is_current(cfg.output, asked, parents(cfg)) and not cfg.regrade and is_as_scored(asked):
        return artifact.left_as_it_is(cfg.output)

    reopen_shares(cfg.output, ranks.rank)
    with named_disk_full(cfg.output), ranks.together(), open_evaluation(asked, ranks) as evaluation:
        if cfg.regrade:
            _regrade(evaluation)
        else:
            _begin(asked, ranks)
            _score(evaluation)
    return cfg.output


def _begin(cfg: EvaluateConfig, ranks: Ranks) -> None:
    """Rank 0 opens the output; the others wait until it did."""
    from megatron_prism.evals.runner import settle_regrading

    if ranks.is_main:
        artifact.begin(cfg.output, "evaluate", cfg, parents(cfg))
        settle_regrading(cfg.output)
    else:
        ranks.wait("the start", lambda: [] if artifact.begun_as(cfg.output) == config_hash(cfg) else [0])


def _score(evaluation: "Evaluation") -> None:
    from megatron_prism.evals.evaluation import ModelRun
    from megatron_prism.evals.follow import models_of

    before = _scored_before(evaluation.cfg)
    scores = {name: found for name, found in before.items() if evaluation.cfg.follow and name.startswith("step_")}  # the run may have removed some
    for model in models_of(evaluation.cfg, evaluation.ranks):
        found = ModelRun(evaluation, model, before.get(model.name, {})).score()
        if found is not None:
            scores[model.name] = found
            _report(evaluation, scores)
    if evaluation.ranks.is_main:
        _finish(evaluation.cfg)


def _regrade(evaluation: "Evaluation") -> None:
    """The responses of a finished evaluation under today's graders, and its scores from them. The models are not looked at. Errors: UserError."""
    from megatron_prism.evals.evaluation import protocol, task_figures
    from megatron_prism.evals.responses import ResponseFolder
    from megatron_prism.evals.runner import pairs_of, regrade

    cfg, before = evaluation.cfg, _scored_before(evaluation.cfg)
    absent = [model.name for model in cfg.models if model.name not in before]
    if evaluation.ranks.world > 1:
        raise UserError(f"regrade=true runs in one process, not on {evaluation.ranks.world} ranks: nothing is generated")
    if absent or not before:
        raise UserError(
            f"regrade=true grades the responses of an evaluation that is done, and {cfg.output} holds no scores of "
            f"{', '.join(absent) or 'any model'} by this recipe: start it without regrade=true first, which draws, grades and scores them"
        )
    todo = [(name, ResponseFolder(cfg.output, name, task.name), task, selection) for name in before for task, selection in evaluation.tasks]
    for name, folder, task, selection in todo:
        folder.claim(protocol(cfg, before[name]["fingerprint"], task), selection.questions)
    _begin(cfg, evaluation.ranks)
    regrade(cfg.output, [(folder, selection.questions) for _, folder, _, selection in todo], evaluation.judge)
    for name, folder, task, selection in todo:
        before[name]["tasks"][task.name] = task_figures(folder, task, selection, pairs_of(selection.questions, sampling_of(cfg, task).n))
    _report(evaluation, before)
    _finish(cfg)


def _report(evaluation: "Evaluation", scores: dict[str, Any]) -> None:
    """Everything that people read, after every model: a series is seen while it grows."""
    from megatron_prism.evals import report, results, table

    cfg = evaluation.cfg
    found = results.of(scores, [model.name for model in cfg.models], cfg.follow)
    content = {"schema_version": SCHEMA_VERSION, "config_hash": config_hash(cfg), **found}
    artifact.write_atomic(cfg.output / "scores.json", json.dumps(content, indent=1) + "\n")
    artifact.write_atomic(cfg.output / "table.md", table.markdown(found))
    artifact.write_atomic(cfg.output / "report.html", report.page(found, report.samples(cfg.output, found, evaluation.tasks)))


def _finish(cfg: EvaluateConfig) -> None:
    """Show the scores; nothing is left to be done."""
    from megatron_prism.evals import table

    found = json.loads((cfg.output / "scores.json").read_text(encoding="utf-8"))
    table.show(found, title=f"scores ({cfg.output / 'scores.json'})")
    for line in table.summary(found):
        print(line)
    shutil.rmtree(cfg.output / "parts", ignore_errors=True)
    artifact.complete(cfg.output)


def _scored_before(cfg: EvaluateConfig) -> dict[str, Any]:
    """What an earlier session of this recipe wrote about the models that it was done with."""
    path = cfg.output / "scores.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return dict(content["models"]) if content.get("config_hash") == config_hash(cfg) else {}


@contextmanager
def open_evaluation(cfg: EvaluateConfig, ranks: Ranks) -> Iterator["Evaluation"]:
    """Questions, held-out text and graders, ready; the model's threads and this rank's GPU are set."""
    from megatron_prism.evals.evaluation import Evaluation
    from megatron_prism.evals.judge import open_judge
    from megatron_prism.evals.progress import progress

    settings = cfg.generation
    ranks.take_own_gpus(settings.servers * settings.tensor_parallel if settings.backend == "vllm" else 1)
    tasks = [(task, task.selection(_limit(cfg), cfg.tasks.data_dir if cfg.tasks else None)) for task in tasks_of(cfg)]
    held_out = _held_out(cfg.perplexity)
    workers = cfg.tasks.grading_workers if cfg.tasks else None
    with torch_threads(cfg.threads), open_judge(workers) as judge, progress() as watch:
        yield Evaluation(cfg, tasks, held_out, judge, ranks, watch)


def _limit(cfg: EvaluateConfig) -> int | None:
    return cfg.tasks.num_questions if cfg.tasks else None


def _held_out(cfg: PerplexityConfig | None) -> list["HeldOut"]:
    from megatron_prism.data_prep.blend import load_blend
    from megatron_prism.evals.perplexity import held_out

    return held_out(load_blend(cfg.blend), cfg.seq_len, cfg.max_tokens) if cfg else []


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Inside, torch computes with `count` threads (None: as before)."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
