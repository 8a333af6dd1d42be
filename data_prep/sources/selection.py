"""What the workers need to make a source's documents: its text format, its rules, and the limits of its sample.

An exact sample needs to have seen every row: the limits come from one pass over the key and rule columns alone, before the first chunk.
Owns: that pass. Refuses: a sample from fewer paths than the recipe has parts.
"""

import heapq
from functools import cached_property

from megatron_prism.data_prep import inputs
from megatron_prism.data_prep.chat_template import Template
from megatron_prism.data_prep.documents import Extract, read_chunk
from megatron_prism.data_prep.formats import PART, Cut, Messages, rank
from megatron_prism.data_prep.inputs import Chunk, Input
from megatron_prism.data_prep.settings import SourceConfig
from megatron_prism.data_prep.tokenizer import Tokenizer
from megatron_prism.errors import UserError

EVERY = (1 << 64) - 1


class Selector:
    """The extracts of one source. keep_bad: how many bad records a chunk describes; tokenizer: whose chat template is meant, where one is."""

    def __init__(self, source: SourceConfig, found: list[Input], keep_bad: int, tokenizer: Tokenizer | None = None):
        self.source, self.found = source, found
        turns = source.messages
        messages = Messages(turns.column, turns.role, turns.content, turns.style, turns.answer, template_of(source, tokenizer)) if turns else None
        rules = tuple(keep.rule for keep in source.keep or ())
        answers, limit = tuple(source.answers or ()), source.max_record_bytes
        self.extract = Extract(
            source.column, source.format, keep_bad, messages, rules, None, source.min_characters, answers=answers, max_record_bytes=limit
        )

    def extract_for(self, chunk: Chunk) -> Extract:
        """How the documents of a chunk are made."""
        if self.source.sample is None:
            return self.extract
        sample = self.source.sample
        return self.extract._replace(cut=Cut(sample.key, sample.seed, sample.count, self._part(chunk), self._limits))

    def _part(self, chunk: Chunk) -> str | None:
        return None if self.source.function else self._parts[self.found[min(chunk.start.input, len(self.found) - 1)].path]

    @cached_property
    def _parts(self) -> dict[str, str]:
        """Every file's part: the number of the first pattern that it matches."""
        parts: dict[str, str] = {}
        for number, pattern in enumerate(self.source.paths):
            for file in inputs.list_inputs(self.source.model_copy(update={"paths": [pattern]})):
                parts.setdefault(file.path, str(number))
        return parts

    @cached_property
    def _limits(self) -> dict[str, int]:
        """The rank of the last row in the sample of each part; a part with fewer rows is taken whole."""
        sample = self.source.sample
        assert sample is not None
        keys = {"column": sample.key, "format": None, "messages": None}
        if self.source.function:
            keys["format"] = f"{{{PART}}}\0{{{sample.key}}}"
        narrow = self.source.model_copy(update=keys)
        extract = self.extract._replace(column=sample.key, format=keys["format"], messages=None, min_characters=None, answers=())
        lowest: dict[str, list[int]] = {}
        for chunk in inputs.chunks(narrow, self.found):
            part = self._part(chunk)
            for text in read_chunk(chunk.kind, chunk.payload, extract).texts:
                own, _, key = text.partition("\0") if part is None else (part, "", text)
                _keep_lowest(lowest.setdefault(own, []), rank(sample.seed, own, key), sample.count)
        return {part: -heap[0] if len(heap) == sample.count else EVERY for part, heap in lowest.items()}


def template_of(source: SourceConfig, tokenizer: Tokenizer | None) -> Template | None:
    """The chat template of a source; None: it names none. Errors: UserError where there is none to be had."""
    turns = source.messages
    if turns is None or turns.style != "template":
        return None
    text = turns.template or (tokenizer.chat_template if tokenizer else None)
    if text is None:
        missing = "the tokenizer has no chat template" if tokenizer else "there is no tokenizer yet, whose chat template it could be"
        raise UserError(f"source {source.name!r}: messages.style='template', and {missing}; give messages.template, a .jinja file, or style='chat'")
    return Template(text, (tokenizer and tokenizer.special_tokens) or {}, turns.arguments or {}, tokenizer.end_text if tokenizer else None)


def _keep_lowest(heap: list[int], value: int, count: int) -> None:
    """A heap of the negatives, so that its first is the largest kept."""
    if len(heap) < count:
        heapq.heappush(heap, -value)
    elif -value > heap[0]:
        heapq.heapreplace(heap, -value)
