"""Real ranks of which one is slow, or stands still: it is named, with its stack, and the job ends."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from multirank import run_ranks
from training import from_random, metrics, recipe

SCRIPT = Path(__file__).parent / "hung_ranks.py"


def _hang(root: Path, ending: str, slow: bool) -> tuple[Path, str, float]:
    """The hung run's folder, what the ranks wrote, and how long all took."""
    settings: dict[str, Any] = {"steps": 12, "log__interval": 6, **from_random(root)}
    hung = recipe(root, root / "hung", watchdog__timeout_minutes=0.05, **settings)
    cases = {"slow": recipe(root, root / "slow", **settings) if slow else None, "hung": hung}
    (root / "cases.json").write_text(json.dumps(cases))
    begun = time.monotonic()
    # recorded before the process group is made, as the stage does it
    env = {"TORCH_FR_BUFFER_SIZE": "2000"}
    done = run_ranks(SCRIPT, 2, str(root / "cases.json"), ending, timeout=150, env=env, check=False)
    assert done.returncode == 1, done.stderr
    return root / "hung", done.stderr, time.monotonic() - begun


@pytest.fixture(scope="module")
def slept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, float]:
    return _hang(tmp_path_factory.mktemp("slept"), "sleep", slow=True)


def test_a_rank_that_stands_still_is_named_with_its_stack_and_the_job_ends(slept: tuple[Path, str, float]) -> None:
    run, said, _ = slept
    record = json.loads((run / "watchdog/summary.json").read_text())
    assert (record["silent"], record["behind"]) == ([], [1])
    assert "behind: rank 1" in said and "a planted fault, step 4" in said and "hung_ranks.py" in said and "stand_still" in said
    assert "rank 0 waits in" in said and "step 4" in said, "the other one waits for it"
    assert "stand_still" in (run / "watchdog/rank_1.txt").read_text()
    assert "stand_still" not in (run / "watchdog/rank_0.txt").read_text()
    assert "Thread" in (run / "watchdog/rank_0.txt").read_text()


def test_torchs_record_of_collectives_lies_beside_the_stacks(slept: tuple[Path, str, float]) -> None:
    run, _, _ = slept
    answers = json.loads((run / "watchdog/summary.json").read_text())["answers"]
    ahead, behind = (sum(int(group["last_enqueued_collective"]) for group in answer["collectives"].values()) for answer in answers)
    assert ahead > behind > 0, "rank 0 waits in a collective that rank 1 has not begun"
    assert all((run / f"watchdog/flight_{rank}").stat().st_size for rank in (0, 1))


def test_a_slow_rank_is_named_in_the_log_with_what_it_is_slow_at(slept: tuple[Path, str, float]) -> None:
    run, said, _ = slept
    line = metrics(run.parent / "slow")[-1]
    assert line["straggler/rank"] == 1 and line["straggler/named"] == [1] and line["straggler/ratio"] > 1.3
    assert "slow: rank 1 (" in said and "pipeline stage 0) needs" in said and "times its peers'" in said


def test_a_stopped_rank_is_named_and_ended_with_the_job(tmp_path: Path) -> None:
    run, said, seconds = _hang(tmp_path, "stop", slow=False)
    record = json.loads((run / "watchdog/summary.json").read_text())
    assert (record["silent"], record["behind"]) == ([1], [])
    assert "behind: rank 1 did not answer" in said and "rank 0 waits in" in said
    assert not [pid for pid in _processes() if "hung_ranks.py" in pid and str(tmp_path) in pid], "the stopped one too"
    assert seconds < 280, "a busy machine takes most of it for imports"


def _processes() -> list[str]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                found.append((folder / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
    return found
