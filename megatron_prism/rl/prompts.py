"""The prompts of a run, and which of them make up a step: a function of the prompts, the seed and the step alone (design law 5).

Every domain with a weight (or all prompts together, where there are none) is an endless stream: epoch after epoch, each in an order of its own drawn
from (seed, domain, epoch, id). Which domain serves the i-th prompt of the run is `data_prep.history`'s schedule, exact to about one prompt. So a run
that is resumed at a step asks what it would have asked, the order of files does not matter, and every prompt is asked once in each epoch; where two
epochs meet in a step, it may hold a prompt twice.

Owns: reading sources, rendering, what is too long, the order. Refuses: a held-out generator, evaluation seeds, two prompts of one id, a domain with
fewer prompts than a step takes of it.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from megatron_prism.config import Block, NonNegative, Positive, PositiveFloat
from megatron_prism.data_prep.history import History, Segment
from megatron_prism.errors import UserError
from megatron_prism.evals.prompts import WithoutTemplate, render
from megatron_prism.evals.registry import Task, load_task
from megatron_prism.evals.responses import graded_as
from megatron_prism.grading import Question
from megatron_prism.rl.prompt_files import check_file, read_prompts, sha256_of
from megatron_prism.rl.records import Prompt

ALL = "all"
EPOCHS_KEPT = 8


class PromptSource(Block):
    """Where prompts come from: a task that makes questions, or a prompt file."""

    task: str | None = None
    """a task of the registry whose questions are generated (reasoning-gym), or the path of a task file; training seeds alone are used"""
    count: Positive = 1000
    """of a task: questions that are generated"""
    seed: NonNegative = 0
    """of a task: of its first question; question i is drawn from seed + i, and all lie below the evaluation's 10^9"""
    params: dict[str, Any] = Field(default_factory=dict)
    """of a task: parameters of its generator that win over the task's own, such as easier ranges"""
    file: Path | None = None
    """a prompt file (docs/rl_prompts.md)"""
    domain: str | None = None
    """what its prompts are told apart by; none: the task's name, or what each line of the file says"""

    @model_validator(mode="after")
    def _check(self) -> "PromptSource":
        if (self.task is None) == (self.file is None):
            raise ValueError("a prompt source is a task or a file: give exactly one")
        fields = type(self).model_fields
        given = [key for key in ("count", "seed", "params") if getattr(self, key) != fields[key].get_default(call_default_factory=True)]
        if self.file is not None and given:
            raise ValueError(f"{', '.join(given)} belong to a task, and file={str(self.file)!r} is set; drop them")
        return self


class AskConfig(Block):
    """How a prompt is put to a model."""

    frame: str = "{question}"
    """put around what a task or a file asks: the format that the reward wants, say"""
    prefix: str = ""
    """how the model's turn begins, a part of the prompt; `<think>` goes with reward.format=opened"""
    chat: bool | None = None
    """ask as a user's turn in the model's chat template; none: as the task says, and files in a chat"""
    without_chat_template: WithoutTemplate = "plain"
    """a model without a chat template, asked in a chat: give it the plain prompt (counted), or refuse it"""

    @model_validator(mode="after")
    def _holds_the_question(self) -> "AskConfig":
        if self.frame.count("{question}") != 1:
            raise ValueError(f"frame={self.frame!r} must hold {{question}} once")
        return self

    def ask(self, text: str, chat: bool, tokenizer: Any) -> tuple[tuple[int, ...], bool | None]:
        """A prompt as token ids, and whether it is in a chat; None: it should be, and the model has no template.

        chat: whether it is meant as a user's turn, where the recipe does not say. Errors: UserError for such a model, where it is to be refused.
        """
        has_template, wanted = bool(getattr(tokenizer, "chat_template", None)), chat if self.chat is None else self.chat
        if wanted and not has_template and self.without_chat_template == "refuse":
            raise UserError(
                "prompts are meant for a chat, and the model's tokenizer has no chat template: add chat_template.jinja to the model's folder, or ask "
                "with the plain prompt: without_chat_template=plain (counted), or chat=false"
            )
        tokens = render(tokenizer, self.frame.replace("{question}", text), wanted and has_template, self.prefix)
        return tokens, None if wanted and not has_template else wanted


class PromptConfig(AskConfig):
    """What the policy is asked."""

    sources: Annotated[list[PromptSource], Field(min_length=1)]
    """[[prompts.sources]] tables"""
    prompts_per_step: Positive = 64
    """prompts of a step (PRISM Table 21: 64)"""
    weights: dict[str, PositiveFloat] | None = None
    """share of each domain in the steps, by name; none: as many as there are, every prompt once an epoch"""
    seed: NonNegative = 1234
    """of the order"""
    max_prompt_tokens: Positive | None = None
    """longer prompts are too long; none: those that leave no room for a response"""
    on_too_long: Literal["drop", "refuse"] = "drop"
    """leave prompts that are too long out (counted), or stop before the run begins"""
    held_out_generators: list[str] = Field(default_factory=list)
    """reasoning-gym data sets that are kept for evaluation: a source that draws from one is refused"""


class Rendered(NamedTuple):
    """A prompt before it is known to fit. in_chat: None where it was meant for a chat that the model has no template for."""

    prompt: Prompt
    in_chat: bool | None


@dataclass(frozen=True)
class SourceReport:
    """What became of a source. read: its questions. too_long: dropped. plain: meant for a chat and asked without. sha256: of a file."""

    name: str
    read: int
    kept: int
    too_long: int
    longest_tokens: int
    plain: int
    sha256: str | None


class PromptSet:
    """Prompts in the order of the steps. Errors: UserError, as the module refuses."""

    def __init__(self, prompts: Sequence[Prompt], config: PromptConfig, sources: Sequence[SourceReport] = ()):
        _check_ids(prompts)
        self.prompts, self.config, self.sources = tuple(prompts), config, tuple(sources)
        domains = Counter(prompt.domain for prompt in prompts)
        weights = {ALL: 1.0} if config.weights is None else config.weights
        self._pools = {name: [prompt for prompt in prompts if name in (ALL, prompt.domain)] for name in weights}
        _check_sizes(domains, {name: len(pool) for name, pool in self._pools.items()}, config)
        self._history = History([Segment(0, weights)])
        self._order = lru_cache(maxsize=EPOCHS_KEPT)(self._ordered)

    def prompts_at(self, step: int) -> list[Prompt]:
        """The prompts of a step, from 0."""
        count = self.config.prompts_per_step
        pools, ordinals = self._history.schedule(step * count, (step + 1) * count)
        return [self._at(self._history.names[pool], int(ordinal)) for pool, ordinal in zip(pools, ordinals, strict=True)]

    @property
    def digest(self) -> str:
        """Of all that decides the steps and what answers are worth: a run goes on with the same prompts only where it is the same."""
        asked = sorted((prompt.id, prompt.domain, prompt.tokens, graded_as(prompt.question)) for prompt in self.prompts)
        what = [asked, self.config.seed, self.config.prompts_per_step, self.config.weights]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What was read and left out, for the run's records."""
        domains = dict(sorted(Counter(prompt.domain for prompt in self.prompts).items()))
        return {"prompts": len(self.prompts), "domains": domains, "digest": self.digest, "sources": [asdict(source) for source in self.sources]}

    def _at(self, pool: str, ordinal: int) -> Prompt:
        epoch, place = divmod(ordinal, len(self._pools[pool]))
        return self._order(pool, epoch)[place]

    def _ordered(self, pool: str, epoch: int) -> list[Prompt]:
        name = f"{self.config.seed}/{pool}/{epoch}/"
        return sorted(self._pools[pool], key=lambda prompt: hashlib.blake2b((name + prompt.id).encode(), digest_size=16).digest())


def load_prompts(config: PromptConfig, tokenizer: Any, longest: int | None = None) -> PromptSet:
    """Read, render and measure all prompts. longest: tokens of a prompt that leaves room for a response. Errors: UserError, before the run."""
    check_sources(config)
    limit = min((tokens for tokens in (config.max_prompt_tokens, longest) if tokens is not None), default=None)
    kept: list[Prompt] = []
    reports = []
    for source in config.sources:
        found = list(_rendered(source, config, tokenizer))
        fitting = [each.prompt for each in found if limit is None or len(each.prompt.tokens) <= limit]
        reports.append(_report(source, found, len(fitting)))
        kept += fitting
    if config.on_too_long == "refuse" and any(report.too_long for report in reports):
        raise UserError(f"prompts are too long: {_too_long(reports, limit)}; raise the limit, or leave them out: prompts.on_too_long=drop")
    empty = [prompt.id for prompt in kept if not prompt.tokens]
    if empty:  # the step that asks it would fail at every start
        raise UserError(f"prompts: {len(empty)} have no tokens, such as {empty[0]!r}: drop them, or ask with a frame, a prefix or a chat template")
    if not kept:
        raise UserError(f"no prompt is left: {_too_long(reports, limit)}; raise prompts.max_prompt_tokens or the context, or give other sources")
    return PromptSet(kept, config, reports)


def check_sources(config: PromptConfig) -> None:
    """What can be said without a tokenizer. Errors: UserError for unknown tasks, held-out generators, evaluation seeds, files that are not there."""
    for source in config.sources:
        if source.file is not None:
            check_file(source.file)
        if source.task is None:
            continue
        task = _task(source)
        if task.dataset in config.held_out_generators:
            raise UserError(
                f"prompts: task {task.name} draws from {task.dataset}, which held_out_generators keeps for evaluation; drop one of the two"
            )
        task.training_questions(source.seed, source.count)


def _rendered(source: PromptSource, config: PromptConfig, tokenizer: Any) -> Iterator[Rendered]:
    """A source's prompts as token ids."""
    for domain, question, text, chat in _asked(source):
        tokens, in_chat = config.ask(text, chat, tokenizer)
        yield Rendered(Prompt(question.id, domain, question, tokens), in_chat)


def _asked(source: PromptSource) -> Iterator[tuple[str, Question, str, bool]]:
    """Domain, question, what is asked, and whether in a chat, of each of a source's prompts."""
    if source.file is not None:
        for line in read_prompts(source.file):
            yield source.domain or line.domain, line.graded, line.asked, True
        return
    task = _task(source)
    assert source.task is not None
    held_out = {question.text for question in load_task(source.task).questions()} if source.params else set()  # at the evaluation's own parameters
    for question in task.training_questions(source.seed, source.count):
        if question.text not in held_out:
            yield source.domain or task.name, question, task.prompt_for(question), task.chat


def _task(source: PromptSource) -> Task:
    assert source.task is not None
    task = load_task(source.task)
    return task.model_copy(update={"params": {**task.params, **source.params}}) if source.params else task


def _report(source: PromptSource, found: Sequence[Rendered], kept: int) -> SourceReport:
    return SourceReport(
        name=source.task or str(source.file),
        read=len(found),
        kept=kept,
        too_long=len(found) - kept,
        longest_tokens=max((len(each.prompt.tokens) for each in found), default=0),
        plain=sum(each.in_chat is None for each in found),
        sha256=sha256_of(source.file) if source.file is not None else None,
    )


def _too_long(reports: Sequence[SourceReport], limit: int | None) -> str:
    said = [f"{report.name}: {report.too_long} of {report.read}, the longest has {report.longest_tokens} tokens" for report in reports]
    return f"more than {limit} tokens have " + "; ".join(said) if limit is not None else "the sources are empty"


def _check_ids(prompts: Sequence[Prompt]) -> None:
    twice = [name for name, count in Counter(prompt.id for prompt in prompts).items() if count > 1]
    if twice:
        raise UserError(
            f"prompts: {len(twice)} ids are there more than once, such as {twice[0]!r}: give sources of one task other seeds, files other ids"
        )


def _check_sizes(domains: Counter[str], pools: dict[str, int], config: PromptConfig) -> None:
    """Errors: UserError for weights that are not the domains', and for a pool that a step empties."""
    weights = {ALL: 1.0} if config.weights is None else config.weights
    if config.weights is not None and set(weights) != set(domains):
        raise UserError(f"prompts.weights={sorted(weights)} must name the domains that there are, each once: {sorted(domains)}")
    total = math.fsum(weights.values())
    for name, size in pools.items():
        wanted = math.ceil(config.prompts_per_step * weights[name] / total - 1e-9)
        if size < wanted:
            raise UserError(
                f"prompts.prompts_per_step={config.prompts_per_step} takes {wanted} prompts of {name!r} a step, and there are {size}; "
                "lower it or the weight, or give more prompts"
            )
