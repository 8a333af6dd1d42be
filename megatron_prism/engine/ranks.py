"""What one rank found, all must have: results and errors of one rank's work, and a word that any rank may have heard. Called on every rank.

torch is imported where it is used: what a recipe is checked with imports this.
"""

import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")


def on_main(work: Callable[[], Result]) -> Result:
    """Rank 0's result of `work`, on every rank; its error is everyone's."""
    import torch.distributed as dist

    answer: list[Any] = [tried(work) if dist.get_rank() == 0 else None]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(answer, src=0)
    return cast(Result, taken(answer[0], 0))


def on_all(work: Callable[[int], Result]) -> list[Result]:
    """Every rank's result of `work(rank)`, on every rank; the first rank's error is everyone's."""
    import torch.distributed as dist

    own = tried(lambda: work(dist.get_rank()))
    if dist.get_world_size() == 1:
        return [taken(own, 0)]
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, own)
    return [taken(answer, rank) for rank, answer in enumerate(answers)]


def concluded(work: Callable[[], Result], conclude: Callable[[list[Result]], None], group: "torch.distributed.ProcessGroup | None" = None) -> None:
    """`work` on every rank, then, where all are done, `conclude` with their results on rank 0. The first rank's error, or rank 0's, is everyone's.

    group: whose ranks, for a thread that has a group of its own; None: all, in the order of the calling thread's collectives.
    """
    import torch.distributed as dist

    own, rank, ranks = tried(work), dist.get_rank(), dist.get_world_size()
    answers: list[Any] = [own] if ranks == 1 else [None] * ranks
    if ranks > 1:
        dist.gather_object(own, answers if rank == 0 else None, dst=0, group=group)
    outcome: list[Any] = [tried(lambda: conclude([taken(answer, place) for place, answer in enumerate(answers)])) if rank == 0 else None]
    if ranks > 1:
        dist.broadcast_object_list(outcome, src=0, group=group)
    error = outcome[0][1]
    if error is not None:
        raise error


def any_rank(heard: bool, device: "torch.device") -> bool:
    """Whether any rank heard it: one number of each, one wait for the device."""
    import torch
    import torch.distributed as dist

    if dist.get_world_size() == 1:
        return heard
    word = torch.tensor(int(heard), device=device)
    dist.all_reduce(word, op=dist.ReduceOp.MAX)
    return bool(word.item())


Outcome = tuple[Any, Exception | None]


def tried(work: Callable[[], Any]) -> Outcome:
    """The result of `work`, or its error: to be sent to other ranks, or told later."""
    try:
        return work(), None
    except Exception as error:  # a boundary: the other ranks wait, and must end too
        return None, _that_travels(error)


def taken(outcome: Outcome, rank: int | None = None) -> Any:
    """The result, or the error raised. rank: whose it is."""
    result, error = outcome
    if error is not None:
        if rank is not None:
            error.add_note(f"on rank {rank}")
        raise error
    return result


def _that_travels(error: Exception) -> Exception:
    """The error, or its words where it cannot be sent as it is: the ranks that it is sent to would wait for it for ever."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does when it is taken apart or made
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
