"""Stored responses as tables to compute with: those of evaluations, those that a run of RL kept, and the counts of the solvability filter.

Owns: which questions two models have in common: those of one id that read the same. Refuses: models without any, kept samples without a prompt that
the filter counted. One response's text is in memory at a time (of a finished file, those of one frame).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from megatron_prism import artifact
from megatron_prism.analysis.behaviour import Answers
from megatron_prism.analysis.transitions import Filtered, Kept
from megatron_prism.errors import UserError
from megatron_prism.evals.frames import records
from megatron_prism.evals.responses import ResponseFolder

GRADING_FAILED = "grading failed"
"""why a kept sample of RL has no verdict"""


class Stored(NamedTuple):
    """A model's answers to a task.

    texts: what each question reads like, in short. drawn_as: how they were drawn, as the evaluation recorded it; `chat` is whether the chat template
    was used, which a model without one was not asked in.
    """

    answers: Answers
    texts: dict[str, str]
    drawn_as: dict[str, Any]

    @property
    def temperature(self) -> float | None:
        """At which its responses were sampled; 0: greedy, the same whenever they are drawn. None: not recorded."""
        found = (self.drawn_as.get("sampling") or {}).get("temperature")
        return None if found is None else float(found)


def read(folder: ResponseFolder) -> Stored:
    """The responses of a finished file."""
    texts: dict[str, str] = {}

    def noted() -> Iterator[Mapping[str, Any]]:
        for record in folder.read():
            texts.setdefault(record["id"], record.get("asked") or xxhash.xxh64_hexdigest(record.get("question", "").encode()))
            yield record

    answers = Answers.of(noted())
    described = json.loads(folder.description.read_text(encoding="utf-8")) if folder.description.is_file() else {}
    done = {key: value for key, value in described.get("facts", {}).items() if key == "chat"}
    return Stored(answers, texts, {**described.get("protocol", {}), **done})


def common_questions(task: str, start: tuple[str, Stored], end: tuple[str, Stored]) -> list[str]:
    """The questions of two named models that are the same. Errors: UserError where there are none."""
    (one, before), (other, after) = start, end
    found = [name for name in before.answers.questions if after.texts.get(name) == before.texts[name]]
    if not found:
        shown = ", ".join(f"{len(side.answers.questions)} of {name} (such as {side.answers.questions[0]!r})" for name, side in (start, end))
        reworded = sum(name in after.texts for name in before.texts)
        raise UserError(
            f"task {task}: models are compared on the questions that both answered, and {one} and {other} have none in common: {shown}"
            + (f", {reworded} of one id that read otherwise" if reworded else "")
            + "; evaluate both on the same questions, or leave the task out with `tasks`"
        )
    return found


def drawn_otherwise(task: str, stored: Sequence[tuple[str, Stored]]) -> list[str]:
    """What has to be said where models' responses to a task were not drawn like the first model's."""
    said = []
    first, *others = ((name, _flat({key: value for key, value in side.drawn_as.items() if key != "model"})) for name, side in stored)
    for name, drawn_as in others:
        differing = [
            f"{key} is {first[1].get(key)!r} and {drawn_as.get(key)!r}" for key in {**first[1], **drawn_as} if first[1].get(key) != drawn_as.get(key)
        ]
        if differing:
            said.append(
                f"{task}: responses of {first[0]} and {name} were drawn otherwise ({'; '.join(differing)[:300]}): a difference may be that alone."
            )
    return said


def without_chance(task: str, stored: Sequence[tuple[str, Stored]]) -> list[str]:
    """What has to be said where chance moves no question, or where that is not known."""
    greedy = [name for name, side in stored if side.temperature == 0]
    unknown = [name for name, side in stored if side.temperature is None]
    said = [f"{task}: {', '.join(greedy)} answered greedily (temperature 0), which no drawing changes: nothing there changes sides by chance."]
    assumed = f"{task}: the temperature of {', '.join(unknown)} is not recorded; what chance would move assumes answers drawn at random."
    return [*(said if greedy else []), *([assumed] if unknown else [])]


def read_filter(prompts: Path) -> dict[str, Filtered]:
    """What `prism prompts` counted, by prompt; those one of whose gradings failed have no count. Errors: UserError where it counted nothing."""
    artifact.require(prompts, "prompts")
    path = prompts / "pass_counts.jsonl"
    if not path.is_file():
        raise UserError(f"rl.prompts={prompts} holds no pass_counts.jsonl: it was made without a solvability block; give an output that has one")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["id"]: Filtered(row["domain"], row["right"], row["samples"]) for row in rows if not row["failed"]}


def read_kept(run: Path) -> list[Kept]:
    """The kept steps of a run of RL, oldest first. Errors: UserError where there are none."""
    artifact.require(run)
    found = [_kept(path) for path in sorted((run / "samples").glob("step_????????.jsonl.zst"))]
    if not found:
        raise UserError(
            f"rl.run={run} holds no samples/step_*.jsonl.zst; give the output of `prism rl`, which keeps samples every samples.interval steps"
        )
    return found


def check_counted(run: Path, kept: Sequence[Kept], prompts: Path, filtered: Mapping[str, Filtered]) -> int:
    """How many of the run's kept prompts the filter did not count. Errors: UserError where it counted none of them."""
    asked = list(dict.fromkeys(name for step in kept for name in step.solved))
    absent = [name for name in asked if name not in filtered]
    if len(absent) == len(asked):
        raise UserError(
            f"rl.run={run} asked prompts such as {(asked or ['none'])[0]!r}, and rl.prompts={prompts} counted others, such as "
            f"{next(iter(filtered), 'none')!r}: give the output of `prism prompts` that the run's prompts.sources name"
        )
    return len(absent)


def _kept(path: Path) -> Kept:
    """Gradings that failed say nothing of a response: they are left out."""
    solved: dict[str, tuple[int, int]] = {}
    for record in records(path):
        if record["why"] != GRADING_FAILED:
            right, samples = solved.get(record["id"], (0, 0))
            solved[record["id"]] = (right + (record["why"] == "correct"), samples + 1)
    return Kept(int(path.name.removeprefix("step_").partition(".")[0]), solved)


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in table.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
