"""The recipe of `prism prep`: which text, which tokenizer, how it is cut and held out. Importing it imports neither torch nor tokenizers."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, model_validator

from megatron_prism.config import RESOLVED, Block, NonNegative, Positive, PositiveFloat
from megatron_prism.data_prep.cleaning.filters import Filters
from megatron_prism.data_prep.formats import PLACEHOLDER
from megatron_prism.data_prep.sources.recipe import STREAM, DatasetConfig, TextConfig, source_columns, with_recipe

SOURCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
RESERVED_NAMES = ("tokenizer", "blend.toml", "cleaning.json", "config.toml", "provenance.json", "complete")
"""What else lies in an output, where letters may count in one case alone."""


class FilterConfig(Block):
    """Limits on a document's text; each drops on its own, and is counted. All are off by default."""

    min_characters: Positive | None = None
    """code points, fewest"""
    max_characters: Positive | None = None
    """code points, most"""
    min_words: Positive | None = None
    """words (what white space separates), fewest; Gopher: 50"""
    max_words: Positive | None = None
    """most; Gopher: 100,000"""
    max_symbol_share: Annotated[float, Field(ge=0, le=1)] | None = None
    """characters that are neither letter nor digit, of those that are not white space"""
    max_repeated_line_share: Annotated[float, Field(ge=0, le=1)] | None = None
    """lines that equal an earlier one, of those that are not blank; Gopher: 0.3"""

    @model_validator(mode="after")
    def _check(self) -> "FilterConfig":
        for unit, least, most in (("characters", self.min_characters, self.max_characters), ("words", self.min_words, self.max_words)):
            if least is not None and most is not None and least > most:
                raise ValueError(f"min_{unit}={least} is more than max_{unit}={most}: no document would be left")
        return self

    @property
    def filters(self) -> Filters:
        """As the workers take them."""
        return Filters(**self.model_dump())


class NearDuplicatesConfig(Block):
    """MinHash over word n-grams; documents of an estimated Jaccard similarity of `threshold` or more are one, and the first of them stays."""

    ngram: Positive = 5
    """words in an n-gram"""
    permutations: Positive = 128
    """hash functions; the estimate's standard error is sqrt(J (1 - J) / permutations), 0.035 at 0.8"""
    bands: Positive = 16
    """groups of permutations; two documents are compared if all of a group agree. 16 of 8 find 95 % of the pairs at 0.8, 99.99 % at 0.9"""
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.8
    """least similarity of near duplicates"""

    @model_validator(mode="after")
    def _check(self) -> "NearDuplicatesConfig":
        if self.permutations % self.bands:
            raise ValueError(f"permutations={self.permutations} must be a multiple of bands={self.bands}")
        return self


class ContaminationConfig(Block):
    """Documents that share a word n-gram with an evaluation task."""

    ngrams: Annotated[list[Path], Field(min_length=1)]
    """n-gram files, or folders of them (docs/cleaning.md says how they are made)"""
    action: Literal["drop", "cut"] = "drop"
    """give the document up, or take the n-grams out of it and keep the rest"""


class CleaningConfig(Block):
    """What is removed besides what the sources' own rules drop. Everything is off by default (docs/cleaning.md)."""

    filters: FilterConfig | None = None
    """limits for every source that has none of its own"""
    exact_duplicates: bool = False
    """drop documents whose text occurred before, in any source; white space and Unicode's normal form aside"""
    near_duplicates: NearDuplicatesConfig | None = None
    """drop documents that are nearly the text of another, in any source"""
    contamination: ContaminationConfig | None = None
    """documents that hold text of evaluation tasks"""
    memory_gib: PositiveFloat = Field(default=4.0, exclude=True)
    """for telling duplicates; with less, hashes are read in more passes. Not part of what the output is"""

    @property
    def needs_scan(self) -> bool:
        """Whether all documents must be seen before the first is tokenised."""
        return self.exact_duplicates or self.near_duplicates is not None or self.contamination is not None


class SourceConfig(TextConfig):
    """One source of text: files, or a Python function that yields documents."""

    name: str
    """the folder of its shards, and what the order of its documents is drawn from"""
    recipe: str | None = None
    """a source recipe by name, or a .toml path: its keys are this source's defaults (docs/sources.md); its name too, unless you give one"""
    domain: str = "general"
    """reports add sources up by it (math, code, science, general, ...)"""
    weight: PositiveFloat | None = None
    """share of sampled tokens, in any unit; none (for every source): in proportion to its tokens"""
    paths: list[str] = Field(default=[])
    """files, folders (all known files below) or glob patterns, ** included; .jsonl and .txt may be .gz or .zst. `path` is short for one of them"""
    function: str | None = None
    """instead of paths: "package.module:function" or "path/to/file.py:function", yielding str or dict; must yield the same each time"""
    arguments: dict[str, Any] = Field(default={})
    """keyword arguments of the function"""
    kind: Literal["jsonl", "parquet", "text"] | None = None
    """what the files are; none: by suffix"""
    dataset: list[DatasetConfig] | None = None
    """on the Hugging Face hub: streamed where neither paths nor function are given"""
    documents: Literal["file", "paragraph"] = "file"
    """plain text: one document per file, or one per block of lines between blank lines"""
    max_record_bytes: Positive = 4 << 20
    """a longer line, paragraph, text file or row is bad, never held whole. This bounds a tokenising process's memory: 4 MiB keep it within 1 GiB"""
    filters: FilterConfig | None = None
    """in place of cleaning.filters, all of them; an empty table: none"""

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, data: Any, info: ValidationInfo) -> Any:
        """A config that was resolved says what its source recipe said then."""
        return with_recipe(data) if isinstance(data, dict) and info.context != RESOLVED else data

    @model_validator(mode="after")
    def _check(self) -> "SourceConfig":
        if not SOURCE_NAME.fullmatch(self.name) or self.name.lower() in RESERVED_NAMES:
            raise ValueError(f"source name {self.name!r} becomes a folder: use letters, digits, '.', '_', '-', and not {RESERVED_NAMES}")
        if bool(self.paths) == (self.function is not None):
            raise ValueError(f"source {self.name!r} needs either paths or function, and not both")
        if self.sample and self.dataset and self.paths and len(self.paths) < len(self.dataset):
            parts = ", ".join(f"{dataset.id} {dataset.split}" for dataset in self.dataset)
            raise ValueError(f"source {self.name!r} takes {self.sample.count} rows of each of {parts}: give a path for each, in this order")
        if self.messages is not None and self.format is not None:
            raise ValueError(f"source {self.name!r} has both messages and format; give one of them")
        if self.format is not None and not re.search(r"\{([^{}]+)\}", self.format):
            raise ValueError(f"source {self.name!r}: format={self.format!r} names no {{column}}; write it as '{{question}}\\n{{answer}}'")
        if self.answers is not None and not (self.answers and set(self.answers) <= set(PLACEHOLDER.findall(self.format or ""))):
            raise ValueError(f"source {self.name!r}: answers={self.answers} must be columns of format={self.format!r}; those of messages are known")
        return self

    @property
    def columns(self) -> list[str]:
        """The columns that are read: of the document, of the rules, of the sample."""
        return source_columns(self.model_dump(include={"column", "format", "messages", "keep", "sample"}))

    @property
    def text_columns(self) -> list[str]:
        """Those that must hold text."""
        columns = source_columns(self.model_dump(include={"column", "format", "messages", "sample"}))
        return [column for column in columns if self.messages is None or column != self.messages.column]


class PrepConfig(Block):
    """Text -> token shards, a manifest for each, and a blend."""

    output: Path
    """folder to write"""
    tokenizer: Path
    """Hugging Face tokenizer (or model, or checkpoint) folder, or a sentencepiece .model file"""
    tokenizer_backend: Literal["hf", "fastokens"] = Field(default="hf", exclude=True)
    """what runs it; "fastokens" is many times faster, and refused where its ids are not Hugging Face's. Not part of what the output is"""
    source: Annotated[list[SourceConfig], Field(min_length=1)]
    """[[source]] tables"""
    end_of_document: str | None = None
    """token appended to every document; none: the tokenizer's end-of-sequence token"""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """share of documents held out, chosen by a hash of (seed, source, position)"""
    seed: NonNegative = 1234
    """of the held-out documents and of the order of samples"""
    on_bad: Literal["skip", "refuse"] = "skip"
    """records that cannot be read (broken JSON, missing column, invalid UTF-8): count and skip them, or stop at the first"""
    bad_samples: NonNegative = 20
    """how many bad records report.json shows for each source"""
    cleaning: CleaningConfig | None = None
    """duplicates, contamination, filters; none: only what the sources' own rules drop"""
    shard_bytes: Positive = 1 << 30
    """text in one shard; also what an interrupted run may have to do again"""
    workers: Positive | None = Field(default=None, exclude=True)
    """tokenising processes; none: one for each core. Not part of what the output is: any number gives the same bytes"""
    rank: NonNegative | None = Field(default=None, exclude=True)
    """which of `world` prep processes this is, from 0 on; none: as torchrun or srun says, else the only one. Not part of what the output is"""
    world: Positive | None = Field(default=None, exclude=True)
    """how many processes share the work, each with its own parts of the input. Not part of what the output is: any number gives the same bytes"""

    @model_validator(mode="after")
    def _check(self) -> "PrepConfig":
        names = [source.name for source in self.source]
        if len({name.lower() for name in names}) < len(names):
            raise ValueError(f"source names must differ (also on disks that ignore case); got {names}")
        if len({source.weight is None for source in self.source}) > 1:
            raise ValueError("give every source a weight, or none of them (then each has the share of its tokens)")
        if (self.rank is None) != (self.world is None) or (self.rank or 0) >= (self.world or 1):
            raise ValueError(f"rank={self.rank} and world={self.world}: give both, and a rank from 0 to world - 1")
        functions = [source for source in self.source if source.function]
        if functions and self.cleaning is not None and self.cleaning.needs_scan:
            streamed = functions[0].function == STREAM
            what = "streamed from the hub" if streamed else "a function"
            way_out = "download it and give its paths" if streamed else "write its documents to a file"
            raise ValueError(
                f"source {functions[0].name!r} is {what}, and cleaning reads every document twice: what comes the second time may differ; {way_out}, "
                "or leave out duplicates and contamination (the filters of cleaning work with either)"
            )
        return self
