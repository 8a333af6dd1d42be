"""One model through an evaluation, on every rank: its tasks and its perplexity, whatever of them is not on disk yet.

Owns: the order of work, opening the model once and only where something is missing, what tells one model's responses from another's.
"""

import json
import math
import shutil
import struct
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from megatron_prism import artifact, generate
from megatron_prism.errors import UserError
from megatron_prism.evals import prompts, runner, scores
from megatron_prism.evals.models import export_once, find_model, fingerprint, is_hf_folder
from megatron_prism.evals.progress import Watch
from megatron_prism.evals.prompts import Asked
from megatron_prism.evals.ranks import Ranks
from megatron_prism.evals.recipe import EvaluateConfig, ModelEntry, chat_of, sampling_of, tasks_of
from megatron_prism.evals.reference import Mix, paper_score
from megatron_prism.evals.registry import Selection, Task
from megatron_prism.evals.responses import ResponseFolder
from megatron_prism.generate.interface import Generator
from megatron_prism.grading import Question

if TYPE_CHECKING:
    from megatron_prism.evals.perplexity import HeldOut, Likelihood

NOT_VOTED = ("code_block", "whole")
"""extraction rules whose answers are texts that no two responses share"""
MEASURED = ("id", "seconds", "grading_seconds", "prompt_tokens_cut", *scores.KEPT)
PAPER_AVERAGE = "average"
"""the column of the paper's own mean"""
ASKED = {"source", "dataset", "revision", "files", "rows", "seed", "prompt", "prompts", "params"}
"""of a task: what decides which questions it asks, and how"""


@dataclass(frozen=True)
class Evaluation:
    """What every model goes through: the recipe, its tasks with their questions, held-out text; who grades; which rank this is; who is told."""

    cfg: EvaluateConfig
    tasks: Sequence[tuple[Task, Selection]]
    held_out: Sequence["HeldOut"]
    judge: runner.Judge
    ranks: Ranks
    watch: Watch


class ModelRun:
    """One model on this rank. before: its scores in an earlier session, of which perplexity is not measured again."""

    def __init__(self, evaluation: Evaluation, model: ModelEntry, before: Mapping[str, Any]):
        self.evaluation, self.model, self.cfg, self.ranks = evaluation, model, evaluation.cfg, evaluation.ranks
        self.parts = self.cfg.output / "parts" / model.name
        self.found = find_model(model.path)
        self.fingerprint = fingerprint(self.found)
        self.exported = self.parts / f"hf_{self.fingerprint[:12]}"  # a checkpoint that was made again is exported again
        self.before = before if before.get("fingerprint") == self.fingerprint else {}
        self._open = ExitStack()

    def score(self) -> dict[str, Any] | None:
        """Do this rank's share; on rank 0, wait for the others' and return the model's scores."""
        with self._open:
            tasks = {task.name: self._task(task, selection) for task, selection in self.evaluation.tasks}
            measured_as = {part.source: self._measured_as(part) for part in self.evaluation.held_out}
            perplexity = self.before["perplexity"] if self.before.get("perplexity_of") == measured_as else self._perplexity()
        if not self.ranks.is_main:
            return None
        parameters = self.before.get("parameters") or num_parameters(self.hf_folder)
        shutil.rmtree(self.exported, ignore_errors=True)
        found: dict[str, Any] = {"path": str(self.model.path), "fingerprint": self.fingerprint, "parameters": parameters}
        if perplexity:
            found |= {"perplexity": perplexity, "perplexity_of": measured_as}
        if tasks:
            found["tasks"] = tasks
        if self.model.paper:
            found["paper"] = paper_figures(self.model.paper, [*tasks, PAPER_AVERAGE])
        return found

    def drop_other_responses(self) -> None:
        """Remove the responses under this name that another model, or another protocol, gave. Rank 0, before the others look."""
        for task, _ in self.evaluation.tasks:
            folder = self.folder(task)
            if not folder.is_claimed(protocol(self.cfg, self.fingerprint, task)):
                folder.remove()

    def folder(self, task: Task) -> ResponseFolder:
        """Where its responses to a task lie."""
        return ResponseFolder(self.cfg.output, self.model.name, task.name)

    # --- the model, as far as it is needed ---

    @cached_property
    def hf_folder(self) -> Path:
        """The model as a Hugging Face folder; of a checkpoint, rank 0 makes one that all ranks read."""
        if not self.ranks.is_main and not is_hf_folder(self.found):
            self.ranks.wait(f"export of {self.model.name}", lambda: [] if (self.exported / "config.json").is_file() else [0])
        return export_once(self.found, self.exported)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.hf_folder, local_files_only=True, trust_remote_code=False)

    @cached_property
    def generator(self) -> Generator:
        """Open until the model is scored."""
        return self._open.enter_context(generate.open_backend(self.hf_folder, self.cfg.generation.backend_config))

    # --- tasks ---

    def _task(self, task: Task, selection: Selection) -> dict[str, Any] | None:
        folder, sampling, questions = self.folder(task), sampling_of(self.cfg, task), selection.questions
        self._claim(folder, protocol(self.cfg, self.fingerprint, task), questions)
        pairs = runner.pairs_of(questions, sampling.n)
        if not folder.is_finished(pairs, questions):
            self._answer(task, questions, folder)
        return task_figures(folder, task, selection, pairs) if self.ranks.is_main else None

    def _claim(self, folder: ResponseFolder, protocol: Mapping[str, Any], questions: list[Question]) -> None:
        """No rank draws before rank 0 has found that it may: what it refuses must not be among the responses."""
        if self.ranks.is_main:
            folder.claim(protocol, questions)
        else:
            self.ranks.wait(f"the go-ahead for {folder.label}", lambda: [] if folder.is_claimed(protocol) else [0])

    def _answer(self, task: Task, questions: list[Question], folder: ResponseFolder) -> None:
        asked = self._ask(task, questions)
        runner.draw(lambda: self.generator, folder, asked, self.ranks, self.evaluation.judge, self.evaluation.watch)
        if self.ranks.is_main:
            facts = {"chat": asked.chat, "without_template": asked.without_template, "sampling": asdict(asked.sampling)}
            runner.join(folder, asked, self.ranks, self.evaluation.judge, facts)

    def _ask(self, task: Task, questions: list[Question]) -> Asked:
        rules = self.cfg.tasks
        assert rules is not None
        return prompts.ask(task, questions, sampling_of(self.cfg, task), self.tokenizer, chat_of(self.cfg, task), rules.without_chat_template)

    # --- perplexity ---

    def _perplexity(self) -> dict[str, Any]:
        """This rank's share of the sources; on rank 0, the figures of all of them."""
        from megatron_prism.evals.perplexity import Likelihood

        parts = list(self.evaluation.held_out)
        for part in self.ranks.share(parts):
            if self._measured(part) is None:
                self._measure(part)
        if not self.ranks.is_main or not parts:
            return {}

        def late() -> list[int]:
            return [place % self.ranks.world for place, part in enumerate(parts) if self._measured(part) is None]

        self.ranks.wait(f"perplexity of {self.model.name}", late)
        return _figures(parts, {part.source: Likelihood(**found) for part in parts if (found := self._measured(part))})

    def _measure(self, part: "HeldOut") -> None:
        from megatron_prism.evals import perplexity

        assert self.cfg.perplexity is not None
        self._check_tokenizer(self.cfg.perplexity.blend)
        advance = self.evaluation.watch(f"{self.model.name}: perplexity, {part.source}", len(part.windows), 0)
        likelihood = perplexity.measure(self._local_model(), self.tokenizer, part, self.cfg.perplexity.batch_size, advance)
        record = {"of": self._measured_as(part), "likelihood": asdict(likelihood)}
        artifact.write_atomic(self._likelihood_path(part), json.dumps(record) + "\n")

    def _measured(self, part: "HeldOut") -> dict[str, Any] | None:
        path = self._likelihood_path(part)
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return record["likelihood"] if record.get("of") == self._measured_as(part) else None

    def _measured_as(self, part: "HeldOut") -> list[str]:
        """What the figures of a source depend on."""
        return [self.fingerprint, self.cfg.generation.dtype, part.domain, part.digest]

    def _likelihood_path(self, part: "HeldOut") -> Path:
        return self.parts / "perplexity" / f"{part.source}.json"

    def _local_model(self) -> Any:
        """The transformers model: perplexity is measured in this process, whatever generates."""
        from megatron_prism.generate.transformers_backend import TransformersGenerator

        generator = self.generator if self.cfg.generation.backend == "transformers" else self._transformers
        assert isinstance(generator, TransformersGenerator)
        return generator.model

    @cached_property
    def _transformers(self) -> Generator:
        self._open.close()  # the tasks are done, and their servers hold most of the GPUs
        settings = self.cfg.generation.backend_config.model_copy(update={"backend": "transformers"})
        return self._open.enter_context(generate.open_backend(self.hf_folder, settings))

    def _check_tokenizer(self, blend: Path) -> None:
        """The shards' ids mean the model's tokens: the vocabulary that prep recorded beside the shards is the model's."""
        from transformers import AutoTokenizer

        folder = (blend if blend.is_dir() else blend.parent) / "tokenizer"
        if not folder.is_dir():
            return  # a blend.toml put together by hand: nothing to compare with, and measure() still refuses ids that the model lacks
        ours = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_vocab()
        theirs = self.tokenizer.get_vocab()
        differing = [token for token, place in ours.items() if theirs.get(token) != place]
        if differing:
            raise UserError(
                f"model {self.model.name} reads {len(differing)} of {len(ours)} tokens otherwise than {folder} (such as {differing[0]!r}): "
                "prepare the held-out text with its tokenizer and evaluate it by itself"
            )


def protocol(cfg: EvaluateConfig, model: str, task: Task) -> dict[str, Any]:
    """What decides a response; more questions and more samples may be asked for later. model: its fingerprint."""
    rules, settings = cfg.tasks, cfg.generation
    assert rules is not None
    sampling = {key: value for key, value in asdict(sampling_of(cfg, task)).items() if key != "n"}
    asked = task.model_dump(mode="json", include=ASKED)
    prompt = {"chat": chat_of(cfg, task), "without_template": rules.without_chat_template}
    backend = {key: getattr(settings, key) for key in ("backend", "dtype", "on_too_long", "max_model_len")}
    return {"model": model, **asked, **prompt, "sampling": sampling, **backend}


def is_as_scored(cfg: EvaluateConfig) -> bool:
    """Whether models and tasks are what a finished output was made of: foreign folders and task files are no artifacts that it records."""
    path = cfg.output / "scores.json"
    scored = json.loads(path.read_text(encoding="utf-8"))["models"] if path.is_file() else {}
    now = {model.name: fingerprint(find_model(model.path)) for model in cfg.models}
    if any(scored.get(name, {}).get("fingerprint") != found for name, found in now.items()):
        return False
    return all(
        ResponseFolder(cfg.output, name, task.name).is_claimed(protocol(cfg, found, task)) for name, found in now.items() for task in tasks_of(cfg)
    )


def paper_figures(row: str, columns: Sequence[str]) -> dict[str, Any]:
    """The paper's scores of a model, shares as ours are, with the caveats of their tables. Errors: UserError where the paper has none of them."""
    model, mix, rl = (*row.split("/"), "none")[:3]
    figures = {column: paper_score(model, cast(Mix, mix), cast(Any, rl), column) for column in columns}
    known = {column: figure for column, figure in figures.items() if figure is not None}
    if not known:
        raise UserError(f"the paper has no figures of {row!r} for {', '.join(columns)}; its tables are in megatron_prism/evals/reference")
    caveats = list(dict.fromkeys(f"{figure.table}: {caveat}" for figure in known.values() for caveat in figure.caveats))
    return {"row": row, "scores": {column: figure.value / 100 for column, figure in known.items()}, "caveats": caveats}


def task_figures(folder: ResponseFolder, task: Task, selection: Selection, pairs: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """The scores of a finished task, and what its responses cost (seconds are summed over ranks)."""
    rows = [{key: record[key] for key in MEASURED} for record in folder.read(set(pairs))]
    facts = folder.facts()
    limit = facts["sampling"]["max_new_tokens"]
    return {
        "domain": task.domain,
        **asdict(scores.score(rows, votes=task.extraction not in NOT_VOTED)),
        **facts,
        "prompts_cut": sum(row["prompt_tokens_cut"] > 0 for row in rows) / len(rows),
        "out_of_context": sum(row["finish_reason"] == "length" and row["num_tokens"] < limit for row in rows) / len(rows),
        "generation_seconds": sum(row["seconds"] for row in rows),
        "grading_seconds": sum(row["grading_seconds"] for row in rows),
        "dropped_rows": dict(selection.dropped),
    }


def num_parameters(folder: Path) -> int:
    """Numbers in the safetensors files of a Hugging Face folder, from their headers."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
        total += sum(map(math.prod, shapes))
    return total


def _figures(parts: Sequence["HeldOut"], likelihoods: dict[str, "Likelihood"]) -> dict[str, Any]:
    from megatron_prism.evals import perplexity

    domains = perplexity.by_domain((part.domain, likelihoods[part.source]) for part in parts)
    return {label: {key: value.figures() for key, value in table.items()} for label, table in (("domains", domains), ("sources", likelihoods))}
