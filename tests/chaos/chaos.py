"""One long training of a few ranks that meets one fault after another, beside the same training that meets none; every checkpoint is compared.

    make chaos                                                 30 faults, a mixture drawn from a seed
    make chaos CHAOS_ARGS="--faults kill,full,flip --seed 3"   these
    make chaos CHAOS_ARGS="--device cuda --faults kill,hang" CHAOS_PYTHON=python3

The run is started as docs/survive.md says (`prism launch local --restarts`), and started again by the same command where it ended by itself: told to
stop, or refused because of the fault, whose cause is then taken away. Each checkpoint after a fault has to be the unbroken run's, bit for bit.
Owns: the comparison, and the table.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chaos_faults import Fault, draw, mixture, steps_for
from chaos_runs import PATIENCE_SECONDS, Chaos, Outcome, Run
from multirank import kill_tree
from training import differing, read_state

from megatron_prism import artifact
from megatron_prism.engine import run_folder

DISK_BYTES = 256 << 20


@contextmanager
def small_disk(root: Path) -> Iterator[Path]:
    """A disk of its own that can be filled; a plain folder where none can be mounted."""
    folder = root / "disk"
    folder.mkdir()
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(folder)], check=False, capture_output=True).returncode == 0
    )
    try:
        yield folder
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def can_fill(disk: Path) -> bool:
    """Whether it is a disk of its own."""
    return shutil.disk_usage(disk).total <= 2 * DISK_BYTES


def unbroken_run(run: Run) -> Path:
    """The same training without a fault."""
    output = run.root / "unbroken"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(run.ranks), "-m", "megatron_prism", "train"]
    env = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *run.words(output)], env=env, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return output


def compare(run: Run, unbroken: Path, outcomes: list[Outcome]) -> None:
    """Every checkpoint of the broken run with the unbroken one's of the same step, laid at the door of the last fault before it."""
    for folder in run_folder.complete_steps(run.output):
        step = int(folder.name[5:])
        if not artifact.is_complete(unbroken / "checkpoints" / folder.name):
            continue  # saved because it was told to stop; those after it are compared
        names = differing(read_state(folder), read_state(unbroken / "checkpoints" / folder.name))
        behind = [one for one in outcomes if one.at_step < step]
        if behind:
            behind[-1].compared.append(step)
        if names:
            (behind or outcomes)[-1].wrong.append(f"step {step}: {len(names)} tensors differ, first {names[0]}")


def survive(
    kinds: list[str], seed: int, ranks: int, device: str, root: Path, tell: Callable[[str], None], minutes: float | None = None
) -> dict[str, Any]:
    """All of it; the report, as it is written to chaos.json in `root`. minutes: after so many no further fault happens."""
    wanted = kinds
    with small_disk(root) as disk:
        if "full" in wanted and not can_fill(disk):
            tell("no small disk can be mounted here (needs root): faults of the kind `full` are left out")
            wanted = [kind for kind in wanted if kind != "full"]
        run = Run(root, disk, ranks, device, steps_for(wanted))
        tell(f"seed {seed}, {len(wanted)} faults, {ranks} ranks, {run.steps} steps: {' '.join(wanted)}")
        unbroken = unbroken_run(run)
        begun = time.monotonic()
        try:
            outcomes = _broken_run(run, draw(seed, wanted, ranks), tell, minutes)
        finally:
            if run.process is not None:
                kill_tree(run.process.pid)
            shutil.copytree(run.output, root / "broken", ignore=shutil.ignore_patterns("sharded"), dirs_exist_ok=True)
        seconds = time.monotonic() - begun
        compare(run, unbroken, outcomes)
        report = _report(run, unbroken, outcomes, seconds, seed, device)
    (root / "chaos.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def _broken_run(run: Run, faults: list[Fault], tell: Callable[[str], None], minutes: float | None) -> list[Outcome]:
    chaos, begun, outcomes = Chaos(run, tell), time.monotonic(), []
    run.start()
    for fault in faults:
        if minutes is not None and time.monotonic() - begun > 60 * minutes:
            tell(f"{minutes:g} minutes are over: {len(faults) - len(outcomes)} faults are left out")
            break
        outcomes.append(chaos.meet(fault))
    assert run.process is not None
    run.process.wait(PATIENCE_SECONDS)
    assert run.process.returncode == 0 and artifact.is_complete(run.output), f"the run did not end well\n{run.said()[-6000:]}"
    return outcomes


def _report(run: Run, unbroken: Path, outcomes: list[Outcome], seconds: float, seed: int, device: str) -> dict[str, Any]:
    recovered = [one.recovered_seconds for one in outcomes if one.recovered_seconds is not None]
    lines = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "grad_norm" in line]
    whole = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    losses = [[(line["step"], line["loss"], line["grad_norm"]) for line in some if "grad_norm" in line] for some in (steps, whole)]
    return {
        "seed": seed,
        "ranks": run.ranks,
        "device": device,
        "faults": len(outcomes),
        "good": sum(not one.wrong for one in outcomes),
        "losses_equal": losses[0] == losses[1],
        "checkpoints_compared": sum(len(one.compared) for one in outcomes),
        "seconds": seconds,
        "step_seconds": sum(line["seconds_per_step"] for line in steps),
        "goodput": sum(line["seconds_per_step"] for line in steps) / seconds,
        "mean_seconds_to_recovery": sum(recovered) / len(recovered) if recovered else None,
        "interruptions": len(recovered),
        "steps": run.steps,
        "steps_again": sum(one.steps_again for one in outcomes),
        "load": os.getloadavg(),
        "outcomes": [one.record() for one in outcomes],
    }


def summary(report: dict[str, Any]) -> str:
    """The last lines."""
    wrong = [f"{one['fault']['number'] + 1} {one['fault']['kind']}: {text}" for one in report["outcomes"] for text in one["wrong"]]
    mean = report["mean_seconds_to_recovery"]
    return "\n".join(
        [
            f"{report['good']} of {report['faults']} faults: {report['checkpoints_compared']} checkpoints equal the unbroken run's bit for bit"
            + (", as do all losses" if report["losses_equal"] else "; LOSSES DIFFER"),
            f"goodput {100 * report['goodput']:.0f} % of {report['seconds']:.0f} s; {report['interruptions']} interruptions, mean time to recovery "
            + (f"{mean:.1f} s" if mean else "none")
            + f"; {report['steps_again']} of {report['steps']} steps taken again; load {report['load'][0]:.1f}",
            *wrong,
        ]
    )


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=30, help="so many, in a mixture drawn from the seed")
    parser.add_argument("--faults", help="these, in this order: kill,stop,hang,full,disk,flip,nan,term,slow,skew")
    parser.add_argument("--seed", type=int, default=10)
    parser.add_argument("--ranks", type=int, help="4; on cuda 2")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--minutes", type=float, help="after so many no further fault happens")
    parser.add_argument("--keep", type=Path, help="folder for all files; must not exist")
    return parser.parse_args()


if __name__ == "__main__":
    asked = _asked()
    folder = asked.keep or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=asked.keep is None)
    kinds = asked.faults.split(",") if asked.faults else mixture(asked.seed, asked.count)
    ranks = asked.ranks or (2 if asked.device == "cuda" else 4)
    found = survive(kinds, asked.seed, ranks, asked.device, folder.resolve(), lambda text: print(text, flush=True), asked.minutes)
    print(summary(found), f"all of it: {folder}/chaos.json", sep="\n")
    sys.exit(0 if found["good"] == found["faults"] and found["losses_equal"] else 1)
