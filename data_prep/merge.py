"""The finished parts of all sources joined to one output: held-out documents, manifests, reports, the blend.

It reads the journals alone, so that any process may do it, and do it again after a crash: what it writes is a function of them.

Owns: the join, what a report says. Refuses: sources without documents, or with all of them held out.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_prism import artifact
from megatron_prism.data_prep.blend import BLEND, Blend, BlendSource, write_blend
from megatron_prism.data_prep.inputs import Input
from megatron_prism.data_prep.journal import HELD_OUT_SUFFIX, Journal, Progress, Unit
from megatron_prism.data_prep.manifest import Manifest, Shard, write_manifest
from megatron_prism.data_prep.parts import Part
from megatron_prism.data_prep.settings import PrepConfig, SourceConfig
from megatron_prism.data_prep.shards import token_dtype
from megatron_prism.data_prep.source_writer import added, check_unit
from megatron_prism.data_prep.tokenizer import Tokenizer
from megatron_prism.data_prep.writer import ShardWriter
from megatron_prism.errors import UserError

REPORT = "report.json"


@dataclass(frozen=True)
class SourceReport:
    """What became of a source, for the table and report.json. bad: by reason; dropped: by rule."""

    name: str
    domain: str
    documents: int
    tokens: int
    text_bytes: int
    held_out_documents: int
    held_out_tokens: int
    records: int
    blank: int
    empty: int
    bad: dict[str, int]
    dropped: dict[str, int] = field(default_factory=dict)
    answer_tokens: int | None = None
    """of `tokens`; None where the source's format does not tell"""


def unfinished(journal: Journal, parts: Sequence[Part]) -> int:
    """How many of the parts are not finished."""
    return sum(not (units and units[-1].progress.finished) for units in (journal.part(part).units() for part in parts))


class Merger:
    """Joins the parts of one source. found: its inputs, in order."""

    def __init__(
        self, config: PrepConfig, source: SourceConfig, parts: Sequence[Part], found: Sequence[Input], tokenizer: Tokenizer, journal: Journal
    ):
        self.config, self.source, self.tokenizer = config, source, tokenizer
        self.folder, self.dtype = config.output / source.name, token_dtype(tokenizer.vocab_size)
        journals = [journal.part(part) for part in parts]
        self.units = [(each, number, unit) for each in journals for number, unit in enumerate(each.units())]
        fingerprints = {path: value for each in journals for path, value in (each.fingerprints() or {}).items()}
        self.inputs = tuple(each._replace(fingerprint=fingerprints[each.path])._asdict() for each in found)
        self.total = total([unit.progress for _, _, unit in self.units if unit.progress.finished], config.bad_samples)

    def merge(self) -> SourceReport:
        """Write both manifests and the report. Errors: UserError for a source without documents to train on, and for shards that are not whole."""
        check_documents(self.source.name, self.total)
        for journal, number, unit in self.units:
            check_unit(self.folder, journal, number, unit)
        train = self._manifest("train", [unit.train for _, _, unit in self.units if unit.train], sum(unit.train_text_bytes for unit in self._all()))
        if not train.shards:
            raise UserError(f"source {self.source.name!r}: all {self.total.documents} documents were held out; lower validation_fraction")
        held = self._manifest("validation", self._join_held_out(), sum(unit.held_out_text_bytes for unit in self._all()))
        for manifest in (train, held):
            if manifest.shards:
                write_manifest(manifest)
        report = self._report(train, held)
        content = {**asdict(report), "bad_samples": self.total.bad_samples}
        artifact.write_atomic(self.folder / REPORT, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        return report

    def _all(self) -> list[Unit]:
        return [unit for _, _, unit in self.units]

    def _manifest(self, split: str, shards: list[Shard], text_bytes: int) -> Manifest:
        return Manifest(
            folder=self.folder / split,
            source=self.source.name,
            split=split,
            tokenizer_hash=self.tokenizer.hash,
            vocab_size=self.tokenizer.vocab_size,
            end_of_document=self.tokenizer.end_of_document,
            dtype=self.dtype,
            text_bytes=text_bytes,
            shards=tuple(shards),
            inputs=self.inputs,
        )

    def _join_held_out(self) -> list[Shard]:
        shards: list[Shard] = []
        writer: ShardWriter | None = None
        for journal, number, unit in self.units:
            if unit.held_out is None:
                continue
            if writer is None:
                writer = ShardWriter(self.folder / "validation" / f"shard_{len(shards):05d}", self.dtype)
            writer.copy(journal.held_out_prefix(number), HELD_OUT_SUFFIX, unit.held_out_text_bytes, unit.held_out)
            if writer.text_bytes >= self.config.shard_bytes:
                shards.append(writer.finish())
                writer = None
        if writer is not None:
            shards.append(writer.finish())
        return shards

    def _report(self, train: Manifest, held: Manifest) -> SourceReport:
        return SourceReport(
            name=self.source.name,
            domain=self.source.domain,
            documents=train.num_documents,
            tokens=train.num_tokens,
            text_bytes=train.text_bytes,
            held_out_documents=held.num_documents,
            held_out_tokens=held.num_tokens,
            records=self.total.records,
            blank=self.total.blank,
            empty=self.total.empty,
            bad=self.total.reasons,
            dropped=self.total.dropped,
            answer_tokens=train.num_answers,
        )


def total(parts: Sequence[Progress], bad_samples: int) -> Progress:
    """The counts of parts, summed, with the first of their bad samples."""
    found = Progress(finished=True)
    for part in parts:
        for name in ("documents", "records", "blank", "empty"):
            setattr(found, name, getattr(found, name) + getattr(part, name))
        found.reasons, found.dropped = added(found.reasons, part.reasons), added(found.dropped, part.dropped)
        found.bad_samples = [*found.bad_samples, *part.bad_samples][:bad_samples]
    return found


def check_documents(source: str, counted: Progress) -> None:
    """Errors: UserError for a source without documents, with what it holds instead."""
    if not counted.documents:
        bad = "; ".join(f"{count} bad: {reason}" for reason, count in counted.reasons.items()) or "none bad"
        dropped = "".join(f"; {count} dropped: {rule}" for rule, count in counted.dropped.items())
        summary = f"{counted.records} records, {counted.blank} blank, {counted.empty} empty, {bad}{dropped}"
        raise UserError(f"source {source!r} holds no documents ({summary}); check its paths, column and kind")


def write_output_blend(config: PrepConfig, reports: Sequence[SourceReport]) -> Path:
    """The blend over the sources' manifests, with the recipe's weights or the tokens that there are."""
    folders = {report.name: (config.output / report.name / "validation" if report.held_out_documents else None) for report in reports}
    sources = [
        BlendSource(source.name, source.domain, source.weight or float(report.tokens), config.output / source.name / "train", folders[source.name])
        for source, report in zip(config.source, reports, strict=True)
    ]
    return write_blend(config.output / BLEND, Blend(config.seed, tuple(sources)))
