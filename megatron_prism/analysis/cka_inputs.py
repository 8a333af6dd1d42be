"""What the models of a CKA read: texts from files, from the registry's tasks or built in, drawn by a seed, and their token ids.

Owns: which texts a set has. A text is drawn by the hash of itself and the seed, so that neither the order of files nor a text that stands twice in
them matters. Refuses: records that are no text (by file and line), sets with fewer texts than asked for, tasks whose prompts depend on a model.
"""

import heapq
import platform
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatron_prism.analysis.cka_recipe import SMALLEST_DRAW, Config, InputSet
from megatron_prism.data_prep import inputs
from megatron_prism.data_prep.documents import Extract, read_chunk
from megatron_prism.data_prep.settings import SourceConfig
from megatron_prism.errors import UserError
from megatron_prism.evals.registry import Task, known_tasks, load_task, load_tasks

PARAGRAPH_CHARACTERS = 200
"""a shorter paragraph of the built-in prose is a heading or a line of grammar"""


@dataclass(frozen=True)
class TextSet:
    """A set as it is read. origin: where its texts are from, in words; found: how many there were to draw from."""

    name: str
    origin: str
    texts: tuple[str, ...]
    found: int


@dataclass(frozen=True)
class Tokens:
    """A set as one model reads it. cut: texts that were longer."""

    ids: tuple[tuple[int, ...], ...]
    cut: int

    @property
    def digest(self) -> str:
        """Of all ids, and where each input ends."""
        hasher = xxhash.xxh3_128()
        for row in self.ids:
            hasher.update(f"{row}".encode())
        return str(hasher.hexdigest())


def read_sets(cfg: Config) -> list[TextSet]:
    """Every set's texts. Errors: UserError for what cannot be read, and for sets that are too small."""
    return [_read(entry, cfg) for entry in cfg.sets]


def read_tokens(texts: TextSet, tokenizer: Any, max_tokens: int, may_cut: bool) -> Tokens:
    """As a tokenizer gives them, those among them that it adds to every text. Errors: UserError for a text without tokens, or cut unasked."""
    whole = [tokenizer(text, verbose=False)["input_ids"] for text in texts.texts]
    empty = next((text for text, row in zip(texts.texts, whole, strict=True) if not row), None)
    if empty is not None:
        raise UserError(f"sets.name={texts.name}: the tokenizer makes no token of {empty[:60]!r}; set min_characters, or leave the text out")
    cut = sum(len(row) > max_tokens for row in whole)
    if cut and not may_cut:
        longest = max(map(len, whole))
        raise UserError(
            f"own_tokenizers=true: {cut} texts of set {texts.name} are longer than max_tokens={max_tokens} and would be cut at other places by other "
            f"tokenizers; set max_tokens={longest}, or give shorter texts"
        )
    return Tokens(tuple(tuple(row[:max_tokens]) for row in whole), cut)


def draw_texts(texts: Iterable[str], count: int, seed: int) -> tuple[list[str], int]:
    """`count` of the distinct texts, those whose hash with the seed is least, in that order; and how many distinct ones there are."""
    kept: list[tuple[int, str]] = []
    seen: set[int] = set()
    for text in texts:
        place = xxhash.xxh3_64_intdigest(f"{seed}\0{text}".encode("utf-8", "surrogatepass"))
        if place in seen:
            continue
        seen.add(place)
        if len(kept) < count:
            heapq.heappush(kept, (-place, text))
        elif -place > kept[0][0]:
            heapq.heapreplace(kept, (-place, text))
    return [text for _, text in sorted(kept, reverse=True)], len(seen)


def _read(entry: InputSet, cfg: Config) -> TextSet:
    origin, texts = _origin(entry, cfg)
    long_enough = (text for text in (text.strip() for text in texts) if len(text) >= entry.min_characters)
    drawn, found = draw_texts(long_enough, cfg.inputs, cfg.seed)
    if found < cfg.inputs:
        fix = f"set inputs={found} and bootstrap.size={found // 2}" if found // 2 >= SMALLEST_DRAW else "there are too few for any draw"
        raise UserError(
            f"sets.name={entry.name} ({origin}) holds {found} different texts of {entry.min_characters} characters or more, inputs={cfg.inputs} are "
            f"asked for; {fix}, or give it more text"
        )
    return TextSet(entry.name, origin, tuple(drawn), found)


def _origin(entry: InputSet, cfg: Config) -> tuple[str, Iterator[str]]:
    if entry.files:
        return ", ".join(entry.files), _of_files(entry)
    if entry.builtin == "prose":
        return f"Python language reference, of Python {platform.python_version()}", _paragraphs()
    if entry.builtin == "tasks":
        tasks = [task for task in map(load_task, known_tasks()) if task.source == "reasoning_gym"]
        return f"prompts of {len(tasks)} tasks of reasoning-gym", _prompts(tasks, cfg.inputs, None)
    tasks = load_tasks(entry.tasks)
    ruled = next((task.name for task in tasks if task.source == "ruler"), None)
    if ruled is not None:
        raise UserError(f"sets.name={entry.name}: the prompts of task {ruled} are made to fill a model's context; give tasks of other sources")
    return f"prompts of {', '.join(task.name for task in tasks)}", _prompts(tasks, cfg.inputs, cfg.data_dir)


def _of_files(entry: InputSet) -> Iterator[str]:
    """The texts of local files, read as `prism prep` reads them."""
    source = SourceConfig.model_validate({"name": entry.name, "paths": entry.files, "column": entry.column, "documents": "paragraph"})
    found = inputs.list_inputs(source)
    for chunk in inputs.chunks(source, found):
        documents = read_chunk(chunk.kind, chunk.payload, Extract(entry.column, None, keep_bad=1, max_record_bytes=source.max_record_bytes))
        for bad in documents.bad:
            path = found[chunk.start.input + bad.input].path
            raise UserError(f"sets.name={entry.name}: {path} holds a record that is no text: {bad.reason} ({bad.excerpt}); set column, or mend it")
        yield from documents.texts


def _paragraphs() -> Iterator[str]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield from (part for part in re.split(r"\n\s*\n", topics[name]) if len(part) >= PARAGRAPH_CHARACTERS)


def _prompts(tasks: list[Task], count: int, data_dir: Path | None) -> Iterator[str]:
    """Up to `count` of each task."""
    for task in tasks:
        questions = task.questions(min(count, task.num_questions), data_dir)
        yield from map(task.prompt_for, questions)
