"""`--restarts`: failures are counted from where a run had got farthest; bad input ends the first start, and counts as a failure later."""

import os
import sys
from pathlib import Path

import pytest

from megatron_prism import checksums, cli
from megatron_prism.errors import ERROR_FILE, NEVER_AGAIN, DivergenceError, PassingDivergenceError
from megatron_prism.launch import job
from megatron_prism.launch.progress import Failures

SESSION = """
import os, pathlib, sys
starts = pathlib.Path(sys.argv[1])
starts.write_text(starts.read_text() + "x")
error = pathlib.Path(os.environ["PRISM_ERROR_FILE"])
word = sys.argv[2].split()[len(starts.read_text()) - 1]
if word == "certain":
    error.with_name(error.name + ".never").touch()
if word != "fails":
    error.write_text("no such key")
sys.exit(1)
"""


def _save(run: Path, step: int) -> None:
    mark = run / f"checkpoints/step_{step:08d}/COMPLETE"
    mark.parent.mkdir(parents=True)
    mark.touch()


def test_failures_count_from_the_farthest_checkpoint(tmp_path: Path) -> None:
    failures, found = Failures("train", tmp_path), []
    for step in (0, 0, 200, 0, 100, 300):
        if step:
            _save(tmp_path, step)
        (tmp_path / "metrics.jsonl").write_text("x" * len(found))
        failures.note(1.0)
        found.append(failures.times)
        if step == 200:
            (tmp_path / "checkpoints/step_00000200/COMPLETE").unlink()
    assert found == [1, 2, 1, 2, 3, 1] and failures.place == "step 300"


def test_without_checkpoints_they_count_from_the_largest_output(tmp_path: Path) -> None:
    failures, found = Failures("evaluate", tmp_path), []
    for length in (10, 10, 4, 11, 11):
        (tmp_path / "responses").write_text("x" * length)
        (tmp_path / "provenance.json").write_text("{}" * len(found))
        failures.note(1.0)
        found.append(failures.times)
    assert found == [1, 2, 3, 1, 2] and failures.place == "bytes 11"


def test_what_grows_at_each_start_is_no_progress_and_no_growth_saves_what_fails_at_every_start(tmp_path: Path) -> None:
    failures = Failures("evaluate", tmp_path / "a.log")  # its own name is not looked at
    (tmp_path / "a.log/wandb").mkdir(parents=True)
    for length in range(3):
        for name in ("generation.log", "part.tmp", "wandb/run", "trackers.json"):
            (tmp_path / "a.log" / name).write_text("x" * length)
        failures.note(1.0)
    assert failures.times == 3
    ends = []
    for seconds in (*range(7), 3600, 3600, 7):
        (tmp_path / "a.log/responses").write_text("x" * (len(ends) + 1))
        failures.note(seconds)
        ends.append(failures.is_over(1))
    assert failures.times == 1 and ends == 9 * [False] + [True]


def test_a_file_that_goes_while_the_output_is_measured_is_none_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def listed_then_gone(folder: Path) -> list[tuple[str, list[str], list[str]]]:
        found = list(walk(folder))
        (tmp_path / "part").unlink(missing_ok=True)
        return found

    walk = os.walk
    monkeypatch.setattr(os, "walk", listed_then_gone)
    (tmp_path / "part").write_text("xxx")
    (tmp_path / "responses").write_text("x")
    failures = Failures("evaluate", tmp_path)
    failures.note(1.0)
    assert (failures.times, failures.place) == (1, "bytes 1")


def test_a_checkpoint_that_the_disk_does_not_tell_of_is_no_progress_and_ends_no_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "RETRY_SECONDS", 0.0)
    failures = Failures("train", tmp_path)
    _save(tmp_path, 8)
    failures.note(1.0)
    mark = tmp_path / "checkpoints/step_00000009/COMPLETE"
    mark.parent.mkdir()
    mark.symlink_to(mark)  # the kernel answers ELOOP, neither that it is there nor that it is not
    failures.note(1.0)
    assert (failures.times, failures.place) == (2, "step 8")
    assert _starts(tmp_path, monkeypatch, "fails fails fails fails") == (1, 3)


def _starts(folder: Path, monkeypatch: pytest.MonkeyPatch, sessions: str) -> tuple[int, int]:
    """The status of a job of such sessions under `--restarts 2` whose output is the folder, and how often it was started."""
    seen = folder / "starts"
    seen.touch()
    monkeypatch.setattr(job, "torchrun_argv", lambda asked: [sys.executable, "-c", SESSION, str(seen), sessions])
    monkeypatch.setattr(job, "SECONDS_MORE", 0.0)
    outcome = job.run_local(job.Job(stage="train"), folder / "log", folder, restarts=2)
    return outcome.status, len(seen.read_text())


@pytest.mark.parametrize(
    ("sessions", "starts", "status"),
    [("refuses", 1, 2), ("fails refuses refuses fails", 3, 2), ("fails certain fails", 2, 2), ("fails fails fails fails", 3, 1)],
)
def test_bad_input_ends_the_first_start_and_is_a_failure_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sessions: str, starts: int, status: int
) -> None:
    assert _starts(tmp_path, monkeypatch, sessions) == (status, starts)


@pytest.mark.parametrize(("kind", "certain"), [(DivergenceError, True), (PassingDivergenceError, False)])
def test_a_step_that_would_go_wrong_again_is_certain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[DivergenceError], certain: bool
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise kind("the loss is no number")

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(sys, "argv", ["prism", "doctor"])
    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "error"))
    with pytest.raises(SystemExit):
        cli.main()
    assert (tmp_path / f"error{NEVER_AGAIN}").exists() == certain == (tmp_path / "error").exists()
