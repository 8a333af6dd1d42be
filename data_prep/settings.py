"""The recipe of `prism prep`: which text, which tokenizer, how it is cut and held out. Importing it imports neither torch nor tokenizers."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_prism.config import Block, NonNegative, Positive, PositiveFloat

SOURCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
RESERVED_NAMES = ("tokenizer",)


class SourceConfig(Block):
    """One source of text: files, or a Python function that yields documents."""

    name: str
    """the folder of its shards, and what the order of its documents is drawn from"""
    domain: str = "general"
    """reports add sources up by it (math, code, science, general, ...)"""
    weight: PositiveFloat | None = None
    """share of sampled tokens, in any unit; none (for every source): in proportion to its tokens"""
    paths: list[str] = Field(default=[])
    """files, folders (all known files below) or glob patterns, ** included; .jsonl and .txt may be .gz or .zst"""
    function: str | None = None
    """instead of paths: "package.module:function" or "path/to/file.py:function", yielding str or dict; must yield the same each time"""
    arguments: dict[str, Any] = Field(default={})
    """keyword arguments of the function"""
    kind: Literal["jsonl", "parquet", "text"] | None = None
    """what the files are; none: by suffix"""
    column: str = "text"
    """the column, or JSON key, that holds the document"""
    format: str | None = None
    """instead of one column: a text with {column} names, as "{question}\\n{answer}" """
    documents: Literal["file", "paragraph"] = "file"
    """plain text: one document per file, or one per block of lines between blank lines"""

    @model_validator(mode="after")
    def _check(self) -> "SourceConfig":
        if not SOURCE_NAME.fullmatch(self.name) or self.name in RESERVED_NAMES:
            raise ValueError(f"source name {self.name!r} becomes a folder: use letters, digits, '.', '_', '-', and not {RESERVED_NAMES}")
        if bool(self.paths) == (self.function is not None):
            raise ValueError(f"source {self.name!r} needs either paths or function, and not both")
        if self.format is not None and not self.columns:
            raise ValueError(f"source {self.name!r}: format={self.format!r} names no {{column}}; write it as '{{question}}\\n{{answer}}'")
        return self

    @property
    def columns(self) -> list[str]:
        """The columns that a document is made of."""
        return list(dict.fromkeys(re.findall(r"\{([^{}]+)\}", self.format))) if self.format is not None else [self.column]


class PrepConfig(Block):
    """Text -> token shards, a manifest for each, and a blend."""

    output: Path
    """folder to write"""
    tokenizer: Path
    """Hugging Face tokenizer (or model, or checkpoint) folder, or a sentencepiece .model file"""
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
    shard_bytes: Positive = 1 << 30
    """text in one shard; also what an interrupted run may have to do again"""
    workers: Positive | None = Field(default=None, exclude=True)
    """tokenising processes; none: one for each core. Not part of what the output is: any number gives the same bytes"""

    @model_validator(mode="after")
    def _check(self) -> "PrepConfig":
        names = [source.name for source in self.source]
        if len({name.lower() for name in names}) < len(names):
            raise ValueError(f"source names must differ (also on disks that ignore case); got {names}")
        if len({source.weight is None for source in self.source}) > 1:
            raise ValueError("give every source a weight, or none of them (then each has the share of its tokens)")
        return self
