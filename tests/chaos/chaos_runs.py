"""A training that meets one fault after another: started as a user starts it, watched from outside by its files, processes and words.

Owns: when a fault happens, what is done about it, and what the run must have said. What happens inside a rank is hooks/sitecustomize.py's.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from chaos_faults import Fault
from multirank import kill_tree
from training import from_random, recipe

from megatron_prism import artifact
from megatron_prism.engine import run_folder

HOOKS = Path(__file__).resolve().parent / "hooks"
POLL_SECONDS = 0.01
PATIENCE_SECONDS = 400
WATCHDOG_MINUTES, LONG_MINUTES = 0.2, 0.75
STOPPED, REFUSED = 75, 2
MENDED = "a copy of weights that another rank updates: gathered anew before the save, and never used"
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
REFUSALS = {"full": r"could not be written: No space left|are free there: nothing was written", "disk": r"is damaged|checksum|cannot be read"}
SAID = {
    "stop": r"behind: rank {rank} did not answer",
    "hang": r"behind: rank {rank} \(",
    "disk": r"is damaged: kept as",
    "flip": r"memory changed since the last update, by no step of the run \(rank {rank} ",
    "nan": r"did not happen again when the batch was replayed",
    "slow": r"slow: rank {rank} \(",
    "term": r"told to stop, and has saved",
    "kill": r"ended by SIGKILL",
}
"""what the run must have written about it"""


@dataclass
class Outcome:
    """What came of a fault. ended_seconds: until no rank was left; recovered_seconds: until a step that the run had not seen before."""

    fault: Fault
    at_step: int
    ended_seconds: float | None = None
    recovered_seconds: float | None = None
    steps_again: int = 0
    answers: list[str] = field(default_factory=list)
    compared: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)


class Run:
    """The training that meets faults, and whoever starts it again."""

    def __init__(self, root: Path, disk: Path, ranks: int, device: str, steps: int) -> None:
        self.root, self.output, self.disk, self.ranks = root, disk / "run", disk, ranks
        self.chaos = root / "chaos"
        self.chaos.mkdir()
        self.device, self.steps = device, steps
        self.log = root / "launcher.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.sessions = 0
        self.past: list[int] = []

    def words(self, output: Path) -> list[str]:
        """The overrides of its recipe."""
        settings: dict[str, Any] = {
            "steps": self.steps,
            "global_batch": 16,
            "data__seq_len": 16,
            "checkpoint__save_interval": 2,
            "checkpoint__keep_last": None,
            "checkpoint__on_corrupt": "previous",
            "watchdog__timeout_minutes": WATCHDOG_MINUTES,
            "watchdog__long_timeout_minutes": LONG_MINUTES,
            "check_memory": True,
            "hidden_dropout": 0.1,
            "schedule__kind": "constant",
            "device": self.device,
        }
        if self.ranks >= 4:
            settings["parallel__pp"] = 2  # and dp=2: the slow one of two ranks with the same work can be told
        if self.device == "cuda":
            settings |= {"precision": "bf16", "deterministic": True}
        return recipe(self.root, output, **settings, **from_random(self.root, **SMALL))

    def start(self) -> None:
        """As a user does it."""
        (self.root / "train.toml").touch()
        words = ["launch", "local", str(self.root / "train.toml"), *self.words(self.output), "--ranks", str(self.ranks), "--restarts", "3"]
        paths = os.pathsep.join(filter(None, [str(HOOKS), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": paths, "CHAOS_FOLDER": str(self.chaos), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "megatron_prism", *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env
            )
        self.sessions += 1

    def rank_processes(self) -> dict[int, psutil.Process]:
        """By rank; empty between two starts."""
        assert self.process is not None
        found = {}
        with suppress(psutil.Error):
            for one in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    environ = one.environ()
                    if "RANK" in environ and "LOCAL_RANK" in environ and one.parent() is not None and "RANK" not in one.parent().environ():
                        found[int(environ["RANK"])] = one
        return found

    def last_step(self) -> int:
        """The newest step of its log."""
        try:
            with (self.output / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
                lines = file.read().splitlines()
        except FileNotFoundError:
            return 0
        for line in reversed(lines):
            with suppress(ValueError):
                found = json.loads(line)
                if "grad_norm" in found:
                    return int(found["step"])
        return 0

    def said(self, since: int = 0) -> str:
        """What was written to the terminal, from this place on."""
        with self.log.open("rb") as file:
            file.seek(since)
            return file.read().decode(errors="replace")

    def wait_for(self, reached: Callable[[], bool], what: str) -> None:
        """Errors: AssertionError where it does not come, with the end of what was written."""
        end = time.monotonic() + PATIENCE_SECONDS
        while not reached():
            assert time.monotonic() < end, f"{what} did not come in {PATIENCE_SECONDS} s\n{self.said()[-6000:]}"
            time.sleep(POLL_SECONDS)


class Chaos:
    """One fault at a time."""

    def __init__(self, run: Run, tell: Callable[[str], None]) -> None:
        self.run, self.tell = run, tell
        self.clock: dict[str, Any] | None = None

    def meet(self, fault: Fault) -> Outcome:
        """Let it happen, see the run through it, and say what came of it."""
        run = self.run
        self.draw = random.Random(fault.seed)
        run.wait_for(lambda: run.last_step() >= fault.step or self._has_ended(), f"step {fault.step}")
        assert not self._has_ended(), f"the run ended before fault {fault.number}\n{run.said()[-6000:]}"
        before, place = run.rank_processes(), run.log.stat().st_size
        happened = self._do(fault, before)
        one = Outcome(fault, run.last_step())
        if fault.kind == "slow":
            run.wait_for(lambda: re.search(self._expected(fault), run.said(place)) is not None or run.last_step() > one.at_step + 22, "the report")
        else:
            self._see_through(one, before, happened, place)
        if MENDED not in one.answers and not re.search(self._expected(fault), run.said(place)):
            one.wrong.append(f"nothing like {self._expected(fault)!r} was written")
        (run.chaos / "fault.json").unlink(missing_ok=True)
        self.tell(line_of(one))
        return one

    def _expected(self, fault: Fault) -> str:
        if fault.kind in ("full", "disk"):
            return REFUSALS[fault.kind] if fault.kind == "full" else f"{SAID['disk']}|{REFUSALS['disk']}"
        return SAID.get(fault.kind, "").format(rank=fault.rank)

    def _see_through(self, one: Outcome, before: dict[int, psutil.Process], happened: float, place: int) -> None:
        run, mends = self.run, one.fault.how.endswith("before a save")
        run.wait_for(
            lambda: not any(_is_there(process) for process in before.values()) or (mends and run.last_step() > one.at_step + 3),
            "the end of all ranks",
        )
        if any(_is_there(process) for process in before.values()):
            one.answers.append(MENDED)
            return
        one.ended_seconds = time.monotonic() - happened
        one.at_step = run.last_step()
        saved = [0, *(int(folder.name[5:]) for folder in run_folder.complete_steps(run.output))]
        if one.fault.kind == "disk":
            self._flip_on_disk(one)
            saved.pop()
        one.steps_again = max(0, one.at_step - saved[-1])

        def goes_on() -> bool:
            if self._has_ended() and run.last_step() < run.steps:
                self._start_again(one, place)
            return run.last_step() > one.at_step or artifact.is_complete(run.output)

        run.wait_for(goes_on, "a new step")
        one.recovered_seconds = time.monotonic() - happened

    def _has_ended(self) -> bool:
        return self.run.process is None or self.run.process.poll() is not None

    def _start_again(self, one: Outcome, place: int) -> None:
        """By the same command, after its cause was taken away where the run refused to go on."""
        status = self.run.process.returncode if self.run.process is not None else 0
        if status == REFUSED:
            errors = [line for line in self.run.said(place).splitlines() if "rror" in line]
            one.answers.append(f"refused: {errors[-1][:300] if errors else 'without a word'}")
        elif status == STOPPED:
            one.answers.append("stopped as told, status 75")
        elif status > 0:
            one.answers.append(f"ended with status {status}")
        self._repair(one)
        self.run.start()

    def _repair(self, one: Outcome) -> None:
        (self.run.disk / "filler").unlink(missing_ok=True)
        if one.fault.kind == "disk" and one.answers and one.answers[-1].startswith("refused"):
            self._unflip()

    # --- what happens ----------------------------------------------------------------------------------------------------------------------------

    def _do(self, fault: Fault, ranks: dict[int, psutil.Process]) -> float:
        """Make it happen; when it did."""
        if fault.kind in ("flip", "nan", "hang", "slow") or fault.how == "in the middle of a save":
            return self._by_hook(fault)
        if fault.kind == "kill" and fault.how == "in a save":
            self.run.wait_for(self._is_saving, "a save")
        else:
            time.sleep(self.draw.uniform(0, 0.15))
        if fault.kind == "kill":
            ranks[fault.rank].send_signal(signal.SIGKILL)
        elif fault.kind == "stop":
            ranks[fault.rank].send_signal(signal.SIGSTOP)
        elif fault.kind == "disk":
            kill_tree(self.run.process.pid if self.run.process else 0)  # all of the machine
        elif fault.kind == "full":
            fill(self.run.disk)
        elif fault.kind == "term":
            self._terminate(fault, ranks)
        elif fault.kind == "skew":
            wanted = {"rank": fault.rank, "offset": fault.details["offset"]}
            (self.run.chaos / "skew.json").write_text(json.dumps(wanted))
            self._terminate(fault, ranks)
        return time.monotonic()

    def _terminate(self, fault: Fault, ranks: dict[int, psutil.Process]) -> None:
        if fault.details.get("launcher") or fault.kind == "skew":
            assert self.run.process is not None
            self.run.process.terminate()
        else:
            ranks[fault.rank].terminate()

    def _by_hook(self, fault: Fault) -> float:
        part = self.run.chaos / "fault.part"
        part.write_text(json.dumps(fault.plan()))
        part.rename(self.run.chaos / "fault.json")
        fired = self.run.chaos / f"fired_{fault.number}"
        self.run.wait_for(fired.exists, f"the moment of fault {fault.number}")
        return float(json.loads(fired.read_text())["monotonic"])

    def _is_saving(self) -> bool:
        folders = sorted((self.run.output / "checkpoints").glob("step_????????"))
        return bool(folders) and not artifact.is_complete(folders[-1])

    def _flip_on_disk(self, one: Outcome) -> None:
        folder = run_folder.newest(self.run.output)
        assert folder is not None
        path = self.draw.choice(sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size))
        self.flipped = path, self.draw.randrange(path.stat().st_size), self.draw.randrange(8)
        self._unflip()
        one.answers.append(f"bit {self.flipped[2]} of byte {self.flipped[1]} of {path.relative_to(folder.parent)}")

    def _unflip(self) -> None:
        path, place, bit = self.flipped
        content = bytearray(path.read_bytes())
        content[place] ^= 1 << bit
        path.write_bytes(content)


def fill(disk: Path) -> None:
    """Leave so little room that the next checkpoint has none."""
    with (disk / "filler").open("wb", buffering=0) as file:
        with suppress(OSError):
            while True:
                file.write(bytes(50_000))
        file.truncate(max(0, file.tell() - 150_000))


def _is_there(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def line_of(one: Outcome) -> str:
    """For people, before checkpoints are compared."""
    times = f"ended in {one.ended_seconds:.1f} s, a new step after {one.recovered_seconds:.1f} s" if one.recovered_seconds else "went on"
    more = "".join(f"; {text}" for text in [*one.answers, *(f"WRONG: {text}" for text in one.wrong)])
    return f"{one.fault.number + 1:3d} {one.fault.kind:5s} rank {one.fault.rank} step {one.at_step:4d} ({one.fault.how}): {times}{more}"
