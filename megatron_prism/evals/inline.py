"""A small fixed suite inside training: every N steps the checkpoint that was just saved answers it, and the scores join the run's metrics.

    RUN/evaluation/responses/step_00000500/TASK.jsonl.zst    every response with its verdict, as `prism evaluate` keeps them

The training loop is handed an `InlineEvaluation` and calls it on every rank; the engine knows nothing of tasks. Rank 0 exports the checkpoint, each
rank opens a copy of the model of its own (transformers, on its device, beside what training holds there) and answers its share, rank 0 joins and
scores; the copies and the export are dropped. One that is killed goes on where it was.
Owns: that evaluating changes nothing of the training (`apart`). Refuses, before training: unknown tasks, missing data, questions that do not fit.
"""

import math
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_prism.engine import recipe
from megatron_prism.engine.recipe import TrainConfig
from megatron_prism.engine.recipe_blocks import EvaluationSection
from megatron_prism.evals.recipe import EvaluateConfig, GenerationConfig, ModelEntry, TasksConfig, chat_of, sampling_of, tasks_of
from megatron_prism.generate.interface import Progress

FOLDER = "evaluation"
PATIENCE_SECONDS = 600.0
"""ranks wait for each other's shares; a rank that dies ends the launch long before"""


def config_of(cfg: TrainConfig, section: EvaluationSection, models: list[ModelEntry]) -> EvaluateConfig:
    """What `prism evaluate` would be asked for these models."""
    asked = {key: getattr(section, key) for key in EvaluationSection.model_fields}
    tasks, generation = ({key: asked[key] for key in block.model_fields if key in asked} for block in (TasksConfig, GenerationConfig))
    dtype = "bfloat16" if cfg.precision == "bf16" else "float32"
    return EvaluateConfig.model_validate(
        {
            "output": cfg.output / FOLDER,
            "models": models,
            "tasks": {"names": section.tasks, **tasks},
            "generation": {"device": cfg.device, "dtype": dtype, **generation},
            "patience_seconds": PATIENCE_SECONDS,
        }
    )


def describe(cfg: TrainConfig, section: EvaluationSection) -> str:
    """What is asked and how often, for a dry run. Errors: UserError for unknown tasks and sampling that makes no sense."""
    tasks = tasks_of(config_of(cfg, section, [_entry(cfg.output)]))
    asked = [f"{task.name} ({min(task.num_questions, section.num_questions or task.num_questions)} questions)" for task in tasks]
    return f"evaluation every {section.interval} steps: {', '.join(asked)}"


class InlineEvaluation:
    """Made before training, on every rank; then called with complete checkpoints."""

    def __init__(self, cfg: TrainConfig, section: EvaluationSection):
        """Errors: UserError for what could not be asked of this model: tasks, data, graders, chat template, room."""
        from megatron_prism.evals.ranks import Ranks
        from megatron_prism.evals.responses import reopen_shares

        self.cfg, self.section = cfg, section
        config = config_of(cfg, section, [_entry(cfg.output)])
        self.ranks = Ranks.of_environment(config.output, PATIENCE_SECONDS)
        self.tasks = [(task, task.selection(section.num_questions, section.data_dir)) for task in tasks_of(config)]
        self._check_questions(config)
        reopen_shares(config.output, self.ranks.rank)

    def __call__(self, checkpoint: Path) -> dict[str, float]:
        """The scores of a checkpoint, on rank 0; nothing on the others, which return when their share is done."""
        import torch.distributed as dist

        from megatron_prism.evals.evaluation import Evaluation, ModelRun
        from megatron_prism.evals.frames import named_disk_full
        from megatron_prism.evals.judge import open_judge

        entry = _entry(checkpoint)
        config = config_of(self.cfg, self.section, [entry])
        with apart(), named_disk_full(config.output), self.ranks.alive(), open_judge(self.section.grading_workers) as judge:
            run = ModelRun(Evaluation(config, self.tasks, [], judge, self.ranks, _unwatched), entry, {})
            if self.ranks.is_main:
                run.drop_other_responses()
            dist.barrier()
            found = run.score()
            if found is None:
                return {}
            shutil.rmtree(config.output / "parts", ignore_errors=True)
        return figures(found["tasks"])

    def _check_questions(self, config: EvaluateConfig) -> None:
        """What a generator would refuse in the middle of training is refused now."""
        from transformers import AutoTokenizer

        from megatron_prism.evals import prompts
        from megatron_prism.generate.interface import Request
        from megatron_prism.generate.room import fit
        from megatron_prism.grading.graders import check_question

        tokenizer = AutoTokenizer.from_pretrained(
            self.cfg.model.tokenizer or recipe.model_files(self.cfg), local_files_only=True, trust_remote_code=False
        )
        positions = recipe.trained_config(self.cfg)[0].get("max_position_embeddings")
        for task, selection in self.tasks:
            for question in selection.questions:
                check_question(question)
            sampling, chat = sampling_of(config, task), chat_of(config, task)
            asked = prompts.ask(task, selection.questions, sampling, tokenizer, chat, self.section.without_chat_template)
            fit([Request(prompt) for prompt in asked.prompts], sampling, positions, self.section.on_too_long)


def figures(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """For metrics.jsonl: the mean accuracy over tasks with its standard error, and each task's own with what was no answer."""
    found = {
        "evaluation/score": sum(task["accuracy"] for task in tasks.values()) / len(tasks),
        "evaluation/standard_error": math.hypot(*(task["standard_error"] for task in tasks.values())) / len(tasks),
    }
    for name, task in tasks.items():
        kept = ("standard_error", "truncated", "no_answer", "mean_tokens")
        found |= {f"evaluation/{name}": task["accuracy"], **{f"evaluation/{name}/{key}": task[key] for key in kept}}
    return found


@contextmanager
def apart() -> Iterator[None]:
    """Inside, random numbers are other ones, and kernels need no fixed order; afterwards all is as it was, and a GPU's spare memory is free."""
    import numpy as np
    import torch

    python, arrays, deterministic = random.getstate(), np.random.get_state(), torch.are_deterministic_algorithms_enabled()
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if on_gpu else []):
        torch.use_deterministic_algorithms(False)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic)
            np.random.set_state(arrays)
            random.setstate(python)
            if on_gpu:
                torch.cuda.empty_cache()


def _entry(checkpoint: Path) -> ModelEntry:
    return ModelEntry(name=checkpoint.name, path=checkpoint)


def _unwatched(label: str, total: int, done: int) -> Progress:
    return lambda count: None
