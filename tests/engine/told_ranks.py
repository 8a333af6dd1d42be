"""Started on two ranks by test_ranks: what each was told of the other. told_ranks.py FOLDER."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_prism.engine import parallel
from megatron_prism.engine.ranks import any_rank, on_all, on_main
from megatron_prism.errors import UserError

WORDS = {"nobody": (), "the first": (0,), "the second": (1,), "both": (0, 1)}


def failing(rank: int) -> Callable[[int], int]:
    """Work that one rank fails in."""

    def work(own: int) -> int:
        if own == rank:
            raise UserError(f"rank {rank} failed")
        return own

    return work


class TwoWordsError(RuntimeError):
    """An error that cannot be made again from what pickle keeps of it."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} {other}")


def failing_oddly(own: int) -> None:
    """The second rank fails with an error that cannot be sent."""
    if own == 1:
        raise TwoWordsError("not", "sent")


def said(work: Callable[[], Any]) -> list[str]:
    """An error's words, and what was noted beside them."""
    try:
        work()
    except (UserError, RuntimeError) as error:
        return [str(error), *error.__notes__]
    return []


parallel.start(torch.device("cpu"))
me = dist.get_rank()
found = {
    "on_main": on_main(lambda: me),
    "on_all": on_all(lambda rank: rank),
    "errors": {
        "main": said(lambda: on_main(lambda: failing(0)(me))),
        "second": said(lambda: on_all(failing(1))),
        "odd": said(lambda: on_all(failing_oddly)),
    },
    "heard": {name: any_rank(me in ranks, torch.device("cpu")) for name, ranks in WORDS.items()},
}
(Path(sys.argv[1]) / f"{me}.json").write_text(json.dumps(found))
parallel.stop()
