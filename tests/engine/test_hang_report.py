"""Who was behind when a run hung, told from the ranks' answers alone."""

from pathlib import Path
from typing import Any

import pytest

from megatron_prism.engine.hang_report import Answer, judge, spans


def _answer(rank: int, **changes: Any) -> Answer:
    usual = {"step": 12, "phase": "forward and backward", "number": 80, "seconds": 600.0, "late": True, "place": "step.py:90 train_step"}
    groups = {"0": {"last_enqueued_collective": "40"}}
    return Answer(**{"rank": rank, "host": "gpu-1", "pid": 7, "waits_in": "all_reduce", "collectives": groups, **usual, **changes})


def _all(ranks: int, **odd: dict[str, Any]) -> dict[int, Answer]:
    return {rank: _answer(rank, **odd.get(f"rank_{rank}", {})) for rank in range(ranks)}


BEFORE = {"0": {"last_enqueued_collective": "39"}}


@pytest.mark.parametrize(
    ("answers", "silent", "behind"),
    [
        ({rank: _answer(rank) for rank in (0, 1, 3)}, [2], []),
        (_all(4, rank_3={"waits_in": None, "number": 90}), [], [3]),
        (_all(4, rank_1={"collectives": BEFORE}), [], [1]),
        (_all(4, rank_2={"number": 79}), [], [2]),
        (_all(4), [], []),
        (_all(4, **{f"rank_{rank}": {"waits_in": None, "collectives": BEFORE if rank == 2 else {}} for rank in range(4)}), [], [0, 1, 3]),
        (_all(1, rank_0={"waits_in": None}), [], [0]),
    ],
    ids=["no answer", "busy while others wait", "fewer collectives", "less progress", "all level", "nobody waits", "alone"],
)
def test_the_rank_that_the_others_wait_for_is_named(answers: dict[int, Answer], silent: list[int], behind: list[int]) -> None:
    found = judge(answers, max(answers) + 1)
    assert (found.silent, found.behind) == (silent, behind)


def test_the_summary_says_who_was_behind_and_what_the_others_waited_in() -> None:
    text = judge(_all(8, rank_3={"waits_in": None, "phase": "reading a micro-batch", "place": "data.py:88 read"}), 8).text(Path("run/watchdog"))
    assert "behind: rank 3 (gpu-1, process 7): reading a micro-batch, step 12, for 600 s; is at data.py:88 read" in text
    assert "ranks 0-2, 4-7 wait in all_reduce: forward and backward, step 12" in text and "run/watchdog/rank_N.txt" in text
    level = judge(_all(2), 2).text(Path("w"))
    assert "no rank is behind the others" in level and "ranks 0-1 wait in all_reduce" in level


def test_ranks_are_written_as_spans() -> None:
    assert [spans(ranks) for ranks in ([4], [0, 1, 2, 5], [])] == ["4", "0-2, 5", ""]
