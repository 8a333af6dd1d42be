"""The matrices that an analysis has measured, so that one that was killed measures the others alone.

    OUTPUT/measured.jsonl.tmp      a line a rule as it is done, "OF RULE CONTENT"; OF: digest of what is analysed; removed at the end

The name ends in .tmp because a finished artifact does not count such files. Owns: writing and reading the lines. A line that was cut short, and every
line of an analysis of something else (other models, pairs or ranks; also one that runs in the same folder at the same time), counts as not there.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_prism.analysis.stream import Batch, Job
from megatron_prism.artifact import write_atomic

SCHEMA_VERSION = 2
"""of the lines, and of what is measured: a change of either begins anew"""
BATCH: TypeAdapter[Batch] = TypeAdapter(Batch)


class Journal:
    """Of one output. found: what was measured before, by rule."""

    def __init__(self, output: Path, job: Job, fingerprints: Sequence[str]) -> None:
        """fingerprints: of the models, in the order of `job.folders`. The output has been begun."""
        self.path = output / "measured.jsonl.tmp"
        self.found: dict[int, Batch] = {}
        self.of = _digest(job, fingerprints)
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.is_file() else []
        for of, rule, content in (line.split(" ", 2) for line in lines if line.count(" ") > 1):
            if of != self.of:
                continue
            try:
                self.found[int(rule)] = BATCH.validate_json(content)
            except (ValidationError, ValueError):
                continue  # the line that was being written
        self._rewrite()

    def add(self, rule: int, batch: Batch) -> None:
        """Keep what was measured."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(self._line(rule, batch))

    def remove(self) -> None:
        """The analysis is finished."""
        self.path.unlink(missing_ok=True)

    def _rewrite(self) -> None:
        """Without what does not count."""
        write_atomic(self.path, "".join(self._line(rule, batch) for rule, batch in self.found.items()))

    def _line(self, rule: int, batch: Batch) -> str:
        return f"{self.of} {rule} {BATCH.dump_json(batch).decode()}\n"


def _digest(job: Job, fingerprints: Sequence[str]) -> str:
    """Folders count beside fingerprints, which may miss a change (`evals.models.fingerprint`)."""
    folders = [str(folder.resolve()) for folder in job.folders]
    content: dict[str, Any] = {**asdict(job), "ranked": sorted(job.ranked), "folders": folders, "fingerprints": list(fingerprints)}
    return hashlib.sha256(json.dumps({"schema_version": SCHEMA_VERSION, **content}).encode()).hexdigest()[:16]
