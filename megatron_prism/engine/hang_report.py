"""Who was behind when a run hung: from what each rank answered. Pure: no torch, no waiting; the answers are `watchdog`'s.

A rank is behind if it did not answer; else if its main thread was busy while others waited for it in a collective; else if it had issued fewer
collectives, or reached less, than the others. Where all are level, nobody is named: the fault is then in what joins them.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

TEXT, RECORD = "summary.txt", "summary.json"
COLLECTIVES = ("torch/distributed/", "megatron/core/distributed/", "megatron/core/pipeline_parallel/p2p_communication")
"""files whose functions wait for other ranks"""
DEVICE_WAIT = "_over_all_ranks"
"""where a rank waits for the device, and so for other ranks: see step.py"""


@dataclass(frozen=True)
class Answer:
    """What a rank said. number: how often it had made progress; late: by its own clock; waits_in: a collective; collectives: the last, by group."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    number: int
    seconds: float
    late: bool
    place: str
    waits_in: str | None
    collectives: dict[str, dict[str, str]]

    def line(self) -> str:
        """For people."""
        what = f"waits in {self.waits_in}" if self.waits_in else f"is at {self.place}"
        return f"rank {self.rank} ({self.host}, process {self.pid}): {self.phase}, step {self.step}, for {self.seconds:.0f} s; {what}"

    @property
    def issued(self) -> int:
        """Collectives that it has begun, over all groups, by torch's record."""
        return sum(max(0, int(group.get("last_enqueued_collective", -1))) for group in self.collectives.values())


@dataclass(frozen=True)
class Verdict:
    """silent: ranks without an answer; behind: of those with one."""

    answers: dict[int, Answer]
    silent: list[int]
    behind: list[int]

    def text(self, folder: Path) -> str:
        """For people: who was behind, what the others did, where the stacks are."""
        lines = ["watchdog: no progress, the run ends"]
        lines += [
            f"behind: rank {rank} did not answer: its process is stopped, dead or out of reach, or compiled code does not return"
            for rank in self.silent
        ]
        lines += [f"behind: {self.answers[rank].line()}" for rank in self.behind]
        if not self.silent and not self.behind:
            lines.append("no rank is behind the others: the fault is in what joins them (network, NCCL), or in all alike")
        rest: dict[tuple[str, str], list[int]] = {}
        for rank, answer in sorted(self.answers.items()):
            if rank not in self.behind:
                doing = f"in {answer.waits_in}" if answer.waits_in else f"at {answer.place}"
                rest.setdefault((doing, f"{answer.phase}, step {answer.step}"), []).append(rank)
        for (doing, phase), ranks in rest.items():
            who = f"ranks {spans(ranks)} wait" if len(ranks) > 1 else f"rank {ranks[0]} waits"
            lines.append(f"{who if doing.startswith('in ') else who.rpartition(' ')[0] + ' stood'} {doing}: {phase}")
        return "\n".join([*lines, f"stacks: {folder}/rank_N.txt, torch's record of collectives: {folder}/flight_N"])

    def record(self) -> dict[str, Any]:
        """For programs."""
        return {"silent": self.silent, "behind": self.behind, "answers": [asdict(answer) for _, answer in sorted(self.answers.items())]}


def judge(answers: dict[int, Answer], ranks: int) -> Verdict:
    """Who was behind, of so many ranks."""
    silent = [rank for rank in range(ranks) if rank not in answers]
    waiting = [answer for answer in answers.values() if answer.waits_in]
    busy = [rank for rank, answer in sorted(answers.items()) if not answer.waits_in]
    if waiting and busy:
        return Verdict(answers, silent, busy)
    if silent:
        return Verdict(answers, silent, [])
    for measure in ("issued", "number"):
        reached = {rank: getattr(answer, measure) for rank, answer in answers.items()}
        if len(set(reached.values())) > 1:
            return Verdict(answers, silent, [rank for rank, value in sorted(reached.items()) if value == min(reached.values())])
    return Verdict(answers, silent, sorted(answers) if ranks == 1 else [])


def place(frame: FrameType) -> str:
    """Where a thread stands: file, line and function."""
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"


def collective(frame: FrameType) -> str | None:
    """The collective that a thread waits in; None where it does something of its own."""
    code = frame.f_code
    if any(part in code.co_filename for part in COLLECTIVES):
        return code.co_name
    return "the step's exchange" if code.co_name == DEVICE_WAIT else None


def spans(ranks: list[int]) -> str:
    """0-2, 5."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
