"""A part of a source on its way to disk: tokens come in order, shards and journal lines go out.

A unit is the work between two journal lines: chunks until their text reaches shard_bytes. It makes one train shard, and puts the held-out documents
beside the journal, where they wait to be joined (thousands of tiny validation shards would help nobody).

Owns: the held-out split, unit boundaries, counting. Refuses: bad records where the recipe says so, finished shards that are not there any more.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_prism import artifact
from megatron_prism.data_prep.held_out import held_out
from megatron_prism.data_prep.inputs import Chunk, Input
from megatron_prism.data_prep.journal import HELD_OUT_SUFFIX, Journal, PartJournal, Progress, Unit
from megatron_prism.data_prep.manifest import Shard, check_size
from megatron_prism.data_prep.parts import Part
from megatron_prism.data_prep.settings import PrepConfig, SourceConfig
from megatron_prism.data_prep.shards import bin_path, idx_path, mask_path, token_dtype
from megatron_prism.data_prep.tokenizer import Tokenizer
from megatron_prism.data_prep.worker import Tokenized
from megatron_prism.data_prep.writer import ShardWriter
from megatron_prism.errors import UserError


class SourceWriter:
    """Takes the chunks of one part of a source in order. Goes on where the journal ends. inputs: of the whole source."""

    def __init__(self, config: PrepConfig, source: SourceConfig, part: Part, inputs: list[Input], tokenizer: Tokenizer, journal: Journal):
        self.config, self.source, self.part, self.inputs, self.tokenizer = config, source, part, inputs, tokenizer
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.folder = config.output / source.name
        self.journal, self._run = journal.part(part), journal
        self._writers: dict[str, ShardWriter] = {}
        self._held = ExitStack()
        self._read_journal()

    def _read_journal(self) -> None:
        """Errors: UserError where inputs changed since the part was begun, or a finished shard is not what it was."""
        before, now = self.journal.fingerprints(), self._fingerprints()
        if before is not None:
            self._run.check_inputs(self.source.name, before, now)
        self.units = self.journal.units()
        self.progress = self.units[-1].progress if self.units else Progress(self.part.start)
        for number, unit in enumerate(self.units):
            check_unit(self.folder, self.journal, number, unit)

    def _fingerprints(self) -> dict[str, str]:
        return {found.path: found.fingerprint for found in self.inputs[self.part.first : self.part.last]}

    def open(self) -> None:
        """Hold the part until `finish` or `discard`; its state is read anew, for another process may have held it. Errors: UserError if one does."""
        self._held.enter_context(self.journal.lock())
        if artifact.is_complete(self.config.output):  # by another process since this run began: the journals are gone
            self._run.remove()
            self.progress = replace(self.progress, finished=True)
            return
        self._read_journal()
        self.journal.begin(self._fingerprints())

    def add(self, chunk: Chunk, result: Tokenized) -> None:
        """Write a chunk's documents, and close the unit when it is full."""
        assert chunk.start == self.progress.end, (chunk.start, self.progress.end)
        self._count(chunk, result)
        held = held_out(self.config.seed, self.part.held_out_key, self.progress.documents, len(result.lengths), self.config.validation_fraction)
        self._write("train", result, ~held)
        self._write("held_out", result, held)
        self.progress = replace(self.progress, end=chunk.end, digest=chunk.digest, documents=self.progress.documents + len(result.lengths))
        if sum(writer.text_bytes for writer in self._writers.values()) >= self.config.shard_bytes:
            self._close_unit()

    def finish(self) -> None:
        """Close the last unit; the part's input is at its end."""
        self.progress = replace(self.progress, finished=True)
        self._close_unit()
        self._held.close()

    def _count(self, chunk: Chunk, result: Tokenized) -> None:
        found, now = result.found, self.progress
        first_line = now.lines if chunk.start.offset else 0
        samples = list(now.bad_samples)
        for bad in found.bad:
            place = {"file": self.inputs[chunk.start.input + bad.input].path, "line": bad.line + (first_line if bad.input == 0 else 0)}
            if self.config.on_bad == "refuse":
                raise UserError(f"{place['file']}, record {place['line']}: {bad.reason}: {bad.excerpt!r}; mend it, or set on_bad=skip")
            if len(samples) < self.config.bad_samples:
                samples.append({**place, "reason": bad.reason, "excerpt": bad.excerpt})
        self.progress = replace(
            now,
            lines=first_line + found.lines,
            records=now.records + found.records,
            blank=now.blank + found.blank,
            empty=now.empty + found.empty,
            reasons=added(now.reasons, found.reasons),
            bad_samples=samples,
            dropped=added(now.dropped, found.dropped),
        )

    def _write(self, split: str, result: Tokenized, chosen: NDArray[np.bool_]) -> None:
        if not chosen.any():
            return
        if split not in self._writers:
            place = self.folder / "train" / f"{self.part.shard_stem}{sum(unit.train is not None for unit in self.units):05d}"
            prefix = place if split == "train" else self.journal.held_out_prefix(self.progress.units)
            self._writers[split] = ShardWriter(prefix, self.dtype, "" if split == "train" else HELD_OUT_SUFFIX)
        tokens = result.tokens if chosen.all() else result.tokens[np.repeat(chosen, result.lengths)]
        answers = None if result.answers is None else result.answers[np.repeat(chosen, result.lengths)]
        self._writers[split].add(tokens, result.lengths[chosen], int(result.text_bytes[chosen].sum()), answers)

    def _close_unit(self) -> None:
        shards: dict[str, Shard] = {split: writer.finish() for split, writer in self._writers.items()}
        sizes = {split: writer.text_bytes for split, writer in self._writers.items()}
        self.progress = replace(self.progress, units=self.progress.units + 1)
        unit = Unit(shards.get("train"), sizes.get("train", 0), shards.get("held_out"), sizes.get("held_out", 0), self.progress)
        self.journal.append(unit)
        self.units.append(unit)
        self._writers = {}

    def forget(self) -> None:
        """Undo what is finished of the part: the next run makes all of it anew."""
        prefixes = [self.folder / "train" / unit.train.name for unit in self.units if unit.train is not None]
        self.journal.forget(len(self.units))
        for prefix in prefixes:
            for path in (bin_path(prefix), idx_path(prefix), mask_path(prefix)):
                path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Give up the shards that are not finished; a later run makes them again."""
        for writer in self._writers.values():
            writer.discard()
        self._held.close()


def check_unit(folder: Path, journal: PartJournal, number: int, unit: Unit) -> None:
    """Errors: UserError for a finished shard of the unit that is not there any more, or not whole. folder: of the source."""
    if unit.train is not None:
        prefix = folder / "train" / unit.train.name
        check_size(bin_path(prefix), unit.train.bin_bytes)
        check_size(idx_path(prefix), unit.train.idx_bytes)
        if unit.train.mask is not None:
            check_size(mask_path(prefix), -(-unit.train.tokens // 8))
    if unit.held_out is not None:
        prefix = journal.held_out_prefix(number)
        check_size(prefix.with_name(f"{prefix.name}.bin{HELD_OUT_SUFFIX}"), unit.held_out.bin_bytes)


def added(before: Mapping[str, int], more: Mapping[str, int]) -> dict[str, int]:
    """Counts by name, summed; names that are new come sorted after the others."""
    return {name: before.get(name, 0) + more.get(name, 0) for name in [*before, *sorted(more)]}
