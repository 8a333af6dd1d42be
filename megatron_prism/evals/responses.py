"""The responses of one model to one task: written by many ranks, in any number of sessions, joined into one file.

    OUTPUT/responses/MODEL/TASK.jsonl.zst             finished: one record a response, with its verdict, questions in order
    OUTPUT/responses/MODEL/TASK.json                  how they are drawn (a session that would draw otherwise is refused), and what was measured
    OUTPUT/parts/MODEL/TASK/responses.RANK.jsonl.zst  as they are finished
    OUTPUT/parts/MODEL/TASK/verdicts.RANK.jsonl.zst   as they are graded
    OUTPUT/parts/MODEL/TASK/ended.RANK.json           that this rank has done its share

Owns: which (question, sample) pairs are there, joining the parts. The folder is all that ranks share, so their number may change between sessions.
Refuses: responses drawn otherwise, or to a question that reads otherwise now. A verdict of another grader, rule, answer or test is none: it is made
again.
"""

import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from megatron_prism import artifact
from megatron_prism.errors import UserError
from megatron_prism.evals.frames import Record, RecordLog, frames, read_frame, records, write_all
from megatron_prism.grading import Question

Pair = tuple[str, int]
"""id of a question, number of a sample"""
VERDICT = ("correct", "score", "reason", "answer", "detail", "grading_seconds", "graded_as")
"""what a record says about its grading"""


class ResponseFolder:
    """Where the responses of one model to one task lie."""

    def __init__(self, output: Path, model: str, task: str):
        self.task, self.label = task, f"{model}: {task}"
        self.finished = output / "responses" / model / f"{task}.jsonl.zst"
        self.description = self.finished.with_name(f"{task}.json")
        self.parts = output / "parts" / model / task

    def claim(self, protocol: Mapping[str, Any], questions: Iterable[Question] = ()) -> None:
        """Record how responses are drawn, or compare with what is recorded, where there are responses. Errors: UserError naming what differs."""
        wanted = json.loads(json.dumps(protocol))
        found = self._description().get("protocol")
        answered = {record["id"]: record.get("asked") for path in self._parts("responses") for record in records(path)}
        if found is None or not answered:
            self._describe(protocol=wanted)
            return
        differing = [f"{key} was {found.get(key)!r}, is now {wanted.get(key)!r}" for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
        differing += [f"question {each.id} was another" for each in questions if answered.get(each.id) not in (None, asked(each))][:3]
        if differing:
            raise UserError(
                f"{self.finished.parent} holds responses to {self.task} that were drawn otherwise ({'; '.join(differing)[:600]}): go back to that, "
                f"choose another output, or remove {self.description}, {self.finished} and {self.parts}"
            )

    def is_claimed(self, protocol: Mapping[str, Any]) -> bool:
        """Whether this is how responses are drawn."""
        return bool(self._description().get("protocol") == json.loads(json.dumps(protocol)))

    def remove(self) -> None:
        """All that is there."""
        for path in (self.description, self.finished):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.parts, ignore_errors=True)

    def is_finished(self, pairs: Collection[Pair], questions: Sequence[Question]) -> bool:
        """Whether all these pairs are joined, with verdicts as these questions are graded now."""
        wanted = {question.id: graded_as(question) for question in questions}
        joined = {pair_of(record) for record in records(self.finished) if record.get("graded_as") == wanted.get(record["id"], "")}
        return joined.issuperset(pairs)

    def open_part(self, kind: str, rank: int) -> RecordLog:
        """The rank's own file of `responses` or `verdicts`, to append to."""
        return RecordLog(self._part(kind, str(rank)))

    def answered(self) -> set[Pair]:
        """The pairs whose response is on disk, whoever drew it."""
        while True:
            try:
                return {pair_of(record) for path in self._parts("responses") for record in records(path)}
            except FileNotFoundError:  # joined just now: the finished file holds what that part held
                continue

    def verdicts(self, questions: Mapping[str, Question]) -> dict[Pair, Record]:
        """What was graded so far as these questions, by id, are graded now, whoever did it."""
        wanted = {name: graded_as(question) for name, question in questions.items()}
        found = (record for path in self._parts("verdicts") for record in records(path))
        return {pair_of(record): {key: record[key] for key in VERDICT} for record in found if record.get("graded_as") == wanted.get(record["id"], "")}

    def end_share(self, rank: int, facts: Mapping[str, Any]) -> None:
        """Say that a rank has done its share. facts: what it measured."""
        artifact.write_atomic(self.parts / f"ended.{rank}.json", json.dumps(dict(facts)) + "\n")

    def ended(self) -> dict[int, dict[str, Any]]:
        """The ranks that have done their share, and what they measured."""
        found = {int(path.name.split(".")[1]): path for path in self.parts.glob("ended.*.json")}
        return {rank: json.loads(path.read_text(encoding="utf-8")) for rank, path in sorted(found.items())}

    def responses(self, pairs: Iterable[Pair]) -> Iterator[Record]:
        """Their records in this order, one in memory at a time; pairs without one are left out."""
        places = {
            pair_of(record): (path, frame.start, number)
            for path in self._parts("responses")
            for frame in frames(path)
            for number, record in enumerate(frame.records)
        }
        for pair in pairs:
            if pair in places:
                path, start, number = places[pair]
                yield read_frame(path, start)[number]

    def join(self, pairs: Iterable[Pair], questions: Mapping[str, Question], facts: Mapping[str, Any]) -> None:
        """Write the finished file, which has a response and a verdict for each of these pairs, and remove the parts.

        questions: by id. facts: what was measured.
        """
        verdicts = self.verdicts(questions)
        self._describe(facts=dict(facts))
        write_all(
            self.finished,
            ({**record, "question": questions[record["id"]].text, **verdicts[pair_of(record)]} for record in self.responses(pairs)),
        )
        shutil.rmtree(self.parts, ignore_errors=True)

    def facts(self) -> dict[str, Any]:
        """What the last join was told."""
        return dict(self._description().get("facts", {}))

    def read(self, pairs: Collection[Pair] | None = None) -> Iterator[Record]:
        """The finished records (None: all of them)."""
        return (record for record in records(self.finished) if pairs is None or pair_of(record) in pairs)

    def _description(self) -> dict[str, Any]:
        return dict(json.loads(self.description.read_text(encoding="utf-8"))) if self.description.is_file() else {}

    def _describe(self, **parts: Any) -> None:
        artifact.write_atomic(self.description, json.dumps({**self._description(), **parts}, indent=1, ensure_ascii=False) + "\n")

    def _part(self, kind: str, rank: str) -> Path:
        return self.parts / f"{kind}.{rank}.jsonl.zst"

    def _parts(self, kind: str) -> list[Path]:
        """The files that hold responses or verdicts; a finished file holds both."""
        return [*([self.finished] if self.finished.is_file() else []), *sorted(self.parts.glob(f"{kind}.*.jsonl.zst"))]


def reopen_shares(output: Path, rank: int) -> None:
    """Take back what an earlier session of a rank said of its shares."""
    for ended in output.glob(f"parts/*/*/ended.{rank}.json"):
        ended.unlink(missing_ok=True)


def asked(question: Question) -> str:
    """What a question reads like, in short."""
    return xxhash.xxh64_hexdigest(question.text.encode())


def graded_as(question: Question) -> str:
    """What its verdicts depend on besides the response, in short: grader, rule for answers, the grader's own record (answer, tests, limits)."""
    entry = ordered(question.entry) if isinstance(question.entry, dict) else question.entry  # what is no dict has a repr that tells it apart
    return xxhash.xxh64_hexdigest(repr((question.grader, question.dataset, question.extraction, entry)).encode(errors="surrogatepass"))


def ordered(value: Any) -> Any:
    """The same content in one order, whatever the hash seed of the process."""
    if isinstance(value, dict):
        return sorted((repr(key), ordered(content)) for key, content in value.items())
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    return [ordered(content) for content in value] if isinstance(value, list | tuple) else repr(value)


def pair_of(record: Mapping[str, Any]) -> Pair:
    """The question and the sample that a record is about."""
    return record["id"], record["sample"]
