"""Whether a checkpoint is what was written, asked by all ranks together before anything of it is used: each compares a share of the files.

A damaged checkpoint ends the run with the file, what was expected and what was found, and names the newest one before it that is whole; or, where the
recipe says so, the run goes on from that one, and the damaged folder stays beside it under a name that nobody reads. Called on every rank.
A file that cannot be read is no damage: it ends the run with an error of its own, and no folder is set aside for it.
Owns: that choice. Refuses: a run of which no complete checkpoint is whole (it would begin anew in silence).
"""

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from megatron_prism import artifact, checksums
from megatron_prism.checksums import Checksum, DamagedError
from megatron_prism.engine import run_folder
from megatron_prism.engine.ranks import on_all, on_main
from megatron_prism.errors import NOT_KNOWN, UserError

logger = logging.getLogger(__name__)
OnCorrupt = Literal["refuse", "previous"]
SHOWN = 3


def damages(checkpoint: Path) -> list[str]:
    """What is wrong with a complete checkpoint's files, one text each; the same on every rank. One without checksums is asked for sizes alone."""
    expected, wrong = on_main(lambda: _expected(checkpoint))
    found = on_all(lambda rank: _own_damages(checkpoint, expected, rank))
    return wrong + [text for texts in found for text in texts]


def require_whole(checkpoint: Path) -> None:
    """Errors: DamagedError, the same on every rank, naming the file, what was expected and found, and the newest whole checkpoint before it."""
    wrong = damages(checkpoint)
    if not wrong:
        return
    before = _newest_whole(checkpoint)
    way_out = f"{before} is whole: start from it" if before is not None else "there is no whole checkpoint before it in its folder"
    raise DamagedError(f"{_few(wrong)}. {checkpoint} is damaged, and nothing of it was used; {way_out}")


def choose(run: Path, stage: str, on_corrupt: OnCorrupt) -> Path | None:
    """The checkpoint that a run goes on from, every file of it compared: its newest; None where it has none.

    previous: those that are damaged are set aside, and the newest whole one before them is taken. Errors: UserError where it is damaged and that is
    not asked for, or none is whole.
    """
    newest, mine = on_main(lambda: (run_folder.newest(run), run_folder.is_of(run, stage)))
    if newest is None or not mine:
        return newest
    finished = on_main(lambda: artifact.is_complete(run))
    wrong = damages(newest)
    if not wrong:
        return newest
    before = _newest_whole(newest)
    if before is None:
        raise DamagedError(
            f"{_few(wrong)}. {newest} is damaged, nothing of it was used, and {run} has no whole checkpoint before it; bring the file back from a "
            "copy, or start anew in another output"
        )
    if finished:
        raise DamagedError(
            f"{_few(wrong)}. {newest} is damaged, and nothing of it was used; {before} is whole: bring the file back from a copy, or remove "
            f"{newest} and {run / artifact.COMPLETE} and start the same command again, which takes the steps from there anew"
        )
    if on_corrupt == "refuse":
        raise DamagedError(
            f"{_few(wrong)}. {newest} is damaged, and nothing of it was used; {before} is whole: checkpoint.on_corrupt=previous goes on from it and "
            "keeps the damaged folder under another name; or bring the file back from a copy"
        )
    on_main(lambda: _set_aside(run, before, wrong))
    return before


def _newest_whole(damaged: Path) -> Path | None:
    """The newest checkpoint before a damaged one of the same run that is whole."""
    before = on_main(lambda: [folder for folder in run_folder.complete_steps(damaged.parent.parent) if folder.name < damaged.name])
    return next((folder for folder in reversed(before) if not damages(folder)), None)


def _set_aside(run: Path, whole: Path, wrong: list[str]) -> None:
    """Rank 0: give every complete checkpoint after a whole one a name that is not read, and record it in the run."""
    later = [folder for folder in run_folder.complete_steps(run) if folder.name > whole.name]
    record = [*artifact.provenance(run).get("damaged_checkpoints", [])]
    for folder in later:
        number = 1
        while (aside := folder.with_name(f"{folder.name}{artifact.ASIDE}{number}")).exists():
            number += 1
        folder.rename(aside)
        when = datetime.now(UTC).isoformat(timespec="seconds")
        found = [text for text in wrong if str(folder) in text][:SHOWN]
        record.append({"folder": aside.name, "found": found, "went_on_from": whole.name, "at": when})
        logger.warning("%s is damaged: kept as %s, which nothing reads; the run goes on from %s. %s", folder, aside.name, whole, _few(found))
    artifact.sync_folder(whole.parent)
    artifact.annotate(run, damaged_checkpoints=record)


def _expected(checkpoint: Path) -> tuple[dict[str, Checksum], list[str]]:
    """Rank 0: what each file was, and what is wrong with what says so."""
    try:
        expected, wrong = artifact.expected_checksums(checkpoint)
        if expected is None and not wrong:
            artifact.require(checkpoint)
            logger.warning("%s has no checksums, it was written by an earlier version: sizes of files are all that was compared", checkpoint)
    except NOT_KNOWN:  # nobody knows what is wrong, or whether anything is
        raise
    except UserError as error:
        return {}, [str(error)]
    return expected or {}, wrong


def _own_damages(checkpoint: Path, expected: dict[str, Checksum], rank: int) -> list[str]:
    import torch.distributed as dist

    shares = _shares(expected, dist.get_world_size())
    threads = min(checksums.THREADS, max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda part: checksums.damage(checkpoint / part[0], expected[part[0]], part[1]), shares[rank])
        return sorted({text for text in found if text is not None})


def _shares(expected: dict[str, Checksum], ranks: int) -> list[list[tuple[str, Any]]]:
    """(file, blocks) for each rank, of near-equal bytes; a rank's own files go to it first, which it is about to load."""
    parts = [(name, range(start, min(start + BLOCKS, len(found.blocks)))) for name, found in expected.items() for start in _starts(found)]
    shares: list[list[tuple[str, Any]]] = [[] for _ in range(ranks)]
    limit, loads = -(-sum(max(1, len(blocks)) for _, blocks in parts) // ranks), [0] * ranks
    for name, blocks in parts:
        own = int(name.rpartition("__")[2].partition("_")[0]) % ranks if name.endswith(".distcp") else 0
        rank = own if loads[own] < limit else loads.index(min(loads))
        shares[rank].append((name, blocks))
        loads[rank] += max(1, len(blocks))
    return shares


BLOCKS = 8
"""of a file that one thread compares at a time"""


def _starts(found: Checksum) -> range:
    return range(0, max(1, len(found.blocks)), BLOCKS)


def _few(texts: list[str]) -> str:
    return "; ".join(texts[:SHOWN]) + (f"; and {len(texts) - SHOWN} more" if len(texts) > SHOWN else "")
