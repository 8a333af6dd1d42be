"""Verify: whether a finished output is still what was written: every file there, in its size, with its content.

prism verify CHECKPOINT|RUN|OUTPUT [...]

Of a run, each of its complete checkpoints and, where it is finished, the run itself. Reads every byte of a checkpoint; of other outputs small files
and the ends of large ones (shards of `prism prep` have checksums of their own). Not a stage of a pipeline: it writes nothing. No torch.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from megatron_prism import artifact
from megatron_prism.engine import run_folder
from megatron_prism.errors import NOT_KNOWN, MachineError, UserError


def run(targets: Sequence[Path]) -> None:
    """Say of each folder what was found. Errors, after all were looked at: UserError naming those that are damaged; MachineError those not read."""
    damaged, unread = [], []
    for folder in [part for target in targets for part in _parts(target)]:
        begun = time.perf_counter()
        try:
            artifact.verify(folder)
        except NOT_KNOWN as error:
            unread.append(folder)
            print(f"NOT READ {folder}: {error}")
            continue
        except UserError as error:
            damaged.append(folder)
            print(f"DAMAGED  {folder}: {error}")
            continue
        print(f"whole    {folder}  {_size(folder) / 2**30:.2f} GiB in {time.perf_counter() - begun:.1f} s{_how(folder)}")
    if damaged:
        raise UserError(f"{len(damaged)} damaged: {', '.join(map(str, damaged))}; nothing of these should be used: bring them back from a copy")
    if unread:
        raise MachineError(f"{len(unread)} could not be read: {', '.join(map(str, unread))}; whether they are whole is not known: verify them again")


def _parts(target: Path) -> list[Path]:
    """The folders to look at: a run's complete checkpoints, then the run."""
    if not (target / run_folder.CHECKPOINTS).is_dir():
        return [target]
    found = run_folder.complete_steps(target)
    if not found and not artifact.is_complete(target):
        raise UserError(f"{target} is a run without a complete checkpoint: there is nothing to verify yet")
    return [*found, *([target] if artifact.is_complete(target) else [])]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _how(folder: Path) -> str:
    if artifact.provenance(folder)["kind"] != artifact.CHECKPOINT:
        return ""
    expected, _ = artifact.expected_checksums(folder)
    return f"  {len(expected)} files by checksum" if expected else "  (no checksums: sizes, and the ends of large files)"
