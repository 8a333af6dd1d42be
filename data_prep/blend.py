"""A blend: which prepared sources a run draws from, in which shares, and the seed of their order. One small TOML file.

    seed = 1234
    [[source]]
    name = "megamath"            # its order of documents is drawn from (seed, name, epoch)
    domain = "math"              # reports add sources up by it
    weight = 55.0                # share of sampled tokens; weights need not sum to anything. Or, for every source: tokens = 15_000_000_000
    max_epochs = 4.0             # optional: a run that would read it more often is refused
    loss = "answers"             # optional: which of its tokens count ("all" or "answers"), whatever the training recipe says
    train = "megamath/train"     # folders with a manifest.json, relative to this file
    validation = "megamath/validation"

`prism prep` writes one; edit a copy to change weights or to join several prep outputs. Refuses: double names, weights that are not
positive, weights beside token budgets.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tomli_w

from megatron_prism import artifact
from megatron_prism.config import Block, NonNegative, Positive, PositiveFloat, read_toml, validate
from megatron_prism.data_prep.manifest import Manifest, check_one_tokenizer, load_manifest
from megatron_prism.data_prep.sampler import Sampler
from megatron_prism.errors import UserError

BLEND = "blend.toml"
Loss = Literal["all", "answers"]
"""Whose loss counts: all tokens, or those that the source's format marked as answers."""


@dataclass(frozen=True)
class BlendSource:
    """One source of a blend; the folders are as found from the blend's own place. validation: None where nothing was held out.

    tokens: its budget, where shares come from token budgets; the weight is then the same number. max_epochs: how often a run may read it.
    loss: in place of the recipe's.
    """

    name: str
    domain: str
    weight: float
    train: Path
    validation: Path | None = None
    tokens: int | None = None
    max_epochs: float | None = None
    loss: Loss | None = None


@dataclass(frozen=True)
class Blend:
    """What a run samples from."""

    seed: int
    sources: tuple[BlendSource, ...]

    def manifests(self, split: str = "train") -> list[Manifest]:
        """The manifest of every source's train or validation split, in order; sources without that split are left out. One tokenizer for all."""
        folders = [folder for source in self.sources if (folder := getattr(source, split)) is not None]
        found = [load_manifest(folder) for folder in folders]
        check_one_tokenizer(found)
        return found

    def sampler(self, seq_len: int, manifests: list[Manifest] | None = None) -> Sampler:
        """The sampler of the train split. manifests: as from `manifests()`, where they are at hand."""
        manifests = self.manifests() if manifests is None else manifests
        lengths = [manifest.document_lengths() for manifest in manifests]
        return Sampler(lengths, [source.weight for source in self.sources], seq_len, self.seed, names=[source.name for source in self.sources])


class _SourceTable(Block):
    name: str
    domain: str = "general"
    weight: PositiveFloat | None = None
    tokens: Positive | None = None
    max_epochs: PositiveFloat | None = None
    loss: Loss | None = None
    train: str
    validation: str | None = None


class _BlendFile(Block):
    seed: NonNegative
    source: list[_SourceTable]


def load_blend(path: Path) -> Blend:
    """Read a blend.toml, or the one of a finished prep output. Errors: UserError for bad tables, an unfinished output,
    and an output whose blend names folders elsewhere."""
    path = Path(path)
    if path.is_dir():
        path = path / BLEND
    if (path.parent / artifact.PROVENANCE).is_file() or not path.is_file():
        artifact.require(path.parent, "prep")
    content = validate(read_toml(path), _BlendFile, where=str(path))
    names = [source.name for source in content.source]
    if not names or len(set(names)) < len(names):
        raise UserError(f"{path}: a blend needs at least one [[source]], each with a name of its own; got {names}")
    _check_shares(path, content.source)
    if (path.parent / artifact.PROVENANCE).is_file():  # a stage wrote it, about its own output; a blend of your own joins folders from anywhere
        for folder in (folder for source in content.source for folder in (source.train, source.validation) if folder):
            artifact.inside(path.parent, folder, path.name)
    return Blend(content.seed, tuple(_source(path.parent, table) for table in content.source))


def _check_shares(path: Path, tables: list[_SourceTable]) -> None:
    """Every source has a weight, or every source has a token budget."""
    both = [table.name for table in tables if table.weight is not None and table.tokens is not None]
    neither = [table.name for table in tables if table.weight is None and table.tokens is None]
    weighed, budgeted = ([table.name for table in tables if getattr(table, key) is not None] for key in ("weight", "tokens"))
    if both or neither or (weighed and budgeted):
        named = "; ".join(f"{word}: {', '.join(names)}" for word, names in (("weight", weighed), ("tokens", budgeted), ("neither", neither)) if names)
        raise UserError(f"{path}: shares come from weights or from token budgets: give every source a weight, or every source tokens; found {named}")


def _source(folder: Path, table: _SourceTable) -> BlendSource:
    weight = float(table.tokens) if table.weight is None else table.weight  # type: ignore[arg-type]  # one of them is given: _check_shares
    validation = folder / table.validation if table.validation else None
    return BlendSource(table.name, table.domain, weight, folder / table.train, validation, table.tokens, table.max_epochs, table.loss)


def write_blend(path: Path, blend: Blend) -> Path:
    """Write a blend.toml, with the folders relative to it. Errors: AssertionError for a folder outside the file's own."""
    tables = []
    for source in blend.sources:
        folders = {split: getattr(source, split).relative_to(path.parent).as_posix() for split in ("train", "validation") if getattr(source, split)}
        share = {"weight": source.weight} if source.tokens is None else {"tokens": source.tokens}
        limit = {key: value for key in ("max_epochs", "loss") if (value := getattr(source, key)) is not None}
        tables.append({"name": source.name, "domain": source.domain, **share, **limit, **folders})
    artifact.write_atomic(path, tomli_w.dumps({"seed": blend.seed, "source": tables}))
    return path
