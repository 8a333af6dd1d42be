"""The recipe of `prism adopt`: which shards, which tokenizer made them, what is held out. Importing it imports neither torch nor numpy."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_prism.config import Block, NonNegative, Positive, PositiveFloat
from megatron_prism.data_prep.settings import RESERVED_NAMES, SOURCE_NAME


class AdoptedSource(Block):
    """One source: pairs of .bin and .idx."""

    name: str
    """the folder of its manifests, and what the order of its documents is drawn from"""
    domain: str = "general"
    """reports add sources up by it (math, code, science, general, ...)"""
    weight: PositiveFloat | None = None
    """share of sampled tokens, in any unit; none (for every source): in proportion to its tokens"""
    paths: Annotated[list[str], Field(min_length=1)]
    """pairs to train on: folders (every pair below), glob patterns, or one file or the prefix of a pair; ** included"""
    validation_paths: list[str] = Field(default=[])
    """pairs to validate on, where they are shards of their own; else see validation_fraction"""

    @model_validator(mode="after")
    def _check(self) -> "AdoptedSource":
        if not SOURCE_NAME.fullmatch(self.name) or self.name in RESERVED_NAMES:
            raise ValueError(f"source name {self.name!r} becomes a folder: use letters, digits, '.', '_', '-', and not {RESERVED_NAMES}")
        return self


class AdoptConfig(Block):
    """Megatron shards -> manifests and a blend, by reference."""

    output: Path
    """folder to write"""
    tokenizer: Path
    """what made the shards: Hugging Face tokenizer (or model, or checkpoint) folder, or a sentencepiece .model file"""
    source: Annotated[list[AdoptedSource], Field(min_length=1)]
    """[[source]] tables"""
    end_of_document: str | None = None
    """token that every document should end with; none: the tokenizer's end-of-sequence token"""
    on_missing_end: Literal["warn", "refuse"] = "warn"
    """documents that do not end with it (Megatron-LM without --append-eod): count them and say so, or stop at the first"""
    sequences: Literal["documents", "refuse"] = "refuse"
    """shards with several sequences in a document (Megatron-LM's --split-sentences): take each sequence as a document, or stop"""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """share of documents held out, chosen by a hash of (seed, source, position); the shards stay as they are"""
    seed: NonNegative = 1234
    """of the held-out documents and of the order of samples"""
    references: Literal["absolute", "relative"] = "absolute"
    """how manifests name the shards: absolute (the output may be moved, they may not) or relative (both only together)"""
    workers: Positive | None = Field(default=None, exclude=True)
    """files read at once; none: one for each core, at most 8. Not part of what the output is"""

    @model_validator(mode="after")
    def _whole_documents_are_held_out(self) -> "AdoptConfig":
        if self.sequences == "documents" and self.validation_fraction:
            raise ValueError(
                f"validation_fraction={self.validation_fraction:g} with sequences=documents would hold out single sentences of documents that are "
                "trained on; give validation_paths, or no held-out share"
            )
        return self

    @model_validator(mode="after")
    def _check(self) -> "AdoptConfig":
        names = [source.name for source in self.source]
        if len({name.lower() for name in names}) < len(names):
            raise ValueError(f"source names must differ (also on disks that ignore case); got {names}")
        if len({source.weight is None for source in self.source}) > 1:
            raise ValueError("give every source a weight, or none of them (then each has the share of its tokens)")
        own = [source.name for source in self.source if source.validation_paths]
        if self.validation_fraction and own:
            raise ValueError(f"validation_fraction={self.validation_fraction} holds documents out of every source, but {own} have validation_paths")
        return self
