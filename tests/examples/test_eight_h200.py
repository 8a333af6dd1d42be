"""The benchmark of eight H200s before anybody has them: every case is allowed and fits, a dry run has its layouts, the script resumes and survives.

The whole dry run, on eight CPU processes: python tests/benchmarks/eight_h200.py --device cpu --output OUT
"""

import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import eight_h200
from eight_cases import FEWER, LAWS, PUBLISHED, Case, every_case, tiny
from eight_h200 import BEGIN, END, Site, done, run
from eight_tables import MEMORY_GIB, predict, predicted_table, results_table

from megatron_prism.engine.bench.cases import planned
from megatron_prism.planning.memory import memory

ROOT = Path(__file__).resolve().parents[2]
TIMED = [case for case in every_case() if case.kind == "bench"]


@pytest.mark.parametrize("case", TIMED, ids=lambda case: case.name)
def test_every_case_is_allowed_and_fits_and_recomputes_no_more_than_it_must(case):
    model, train, plan = planned(case.options, case.ranks)
    assert predict(case).choice.need.fits(MEMORY_GIB)
    if train.recompute is not None:
        less = None if train.recompute_layers is None else max(train.recompute_layers - 4, 1)
        training = replace(train.training, recompute=train.recompute if less else None, recompute_layers=less, keep_attention=bool(less))
        assert not memory(model, plan, train.data.seq_len, training).fits(MEMORY_GIB)


def test_what_neighbours_publish_stands_beside_a_case_that_is_there():
    assert set(PUBLISHED) <= {case.name for case in TIMED}


def test_the_predictions_of_the_document_are_of_these_cases():
    written = (ROOT / "docs" / "benchmarks.md").read_text().split(BEGIN)[1].split(END)[0]
    expected = predicted_table(every_case())
    rows = [[line.split("|")[1:3] for line in text.splitlines() if line.startswith("| ")] for text in (written, expected)]
    assert rows[0] == rows[1], "python tests/benchmarks/eight_h200.py --predict --write docs/benchmarks.md"


def test_a_dry_run_has_the_layouts_and_the_ranks_of_the_real_one(tmp_path):
    for case in TIMED:
        small = tiny(case, tmp_path)
        (_, train, plan), (_, other, real) = (planned(each.options, each.ranks) for each in (small, case))
        names = ("tp", "pp", "vpp", "cp", "dp", "sp", "micro_batch")
        assert [getattr(plan, name) for name in names] == [getattr(real, name) for name in names]
        assert (train.recompute, train.keep_attention, train.optimizer) == (other.recompute, other.keep_attention, other.optimizer)


def short(folder: Path, name: str, steps: int = 1, **train: Any) -> Case:
    """A tiny case of one rank."""
    case = tiny(next(case for case in TIMED if case.name == "scaling, 1 GPU"), folder)
    return replace(case, name=name, keys={**case.keys, "name": name, "steps": steps, "train": {**case.keys["train"], **train}})


def site(folder: Path, **changes: Any) -> Site:
    (folder / "output").mkdir(exist_ok=True)
    scratch = folder / f"scratch_{time.monotonic_ns()}"
    scratch.mkdir()
    given = {"device": "cpu", "output": folder / "output", "scratch": scratch, "minutes": 1e6, "limit": 1e6, "any_code": False}
    found = Site(**{**given, **changes})
    found.entries = list(eight_h200.entries_of([found.output / eight_h200.RESULTS]))
    return found


def test_a_case_that_fails_is_recorded_and_tried_again_and_those_that_are_done_are_not(tmp_path, monkeypatch):
    optimizer = {"lr": 1e30}
    cases = [short(tmp_path, "first"), short(tmp_path, "diverges", optimizer=optimizer), short(tmp_path, "last")]
    once = site(tmp_path)
    run(once, cases)
    assert [done(once, case) for case in cases] == [True, False, True]
    assert "the loss is nan" in once.find(cases[1])["failed"] and once.launches == 1

    again = site(tmp_path)
    tried = []
    monkeypatch.setattr(eight_h200, "bench", lambda _, group: tried.extend(case.name for case in group) or len(group))
    run(again, cases)
    assert tried == ["diverges"]

    table = results_table(cases, again.find, "cpu").splitlines()
    assert "failed: the loss is nan" in table[3] and "not run" not in "".join(table)

    monkeypatch.setattr(eight_h200, "code_digest", lambda: "other")
    assert not any(done(site(tmp_path), case) for case in cases)
    assert done(site(tmp_path, any_code=True), cases[0])


@pytest.mark.slow
def test_a_launch_that_dies_ends_its_case_alone_and_time_that_is_up_ends_what_runs(tmp_path):
    first, endless, last = short(tmp_path, "first"), short(tmp_path, "endless", steps=1_000_000), short(tmp_path, "last")
    broken = site(tmp_path)

    def kill_a_rank() -> None:
        while len(broken.entries) < 1:
            time.sleep(0.1)
        time.sleep(3)
        ranks = [process for process in psutil.Process().children(recursive=True) if "RANK" in process.environ()]
        ranks[-1].kill()

    killer = threading.Thread(target=kill_a_rank)
    killer.start()
    run(broken, [first, endless, last])
    killer.join()
    assert [done(broken, case) for case in (first, endless, last)] == [True, False, True]
    assert "its launch ended" in broken.find(endless)["failed"] and broken.launches == 2

    late = site(tmp_path, minutes=0.3, limit=0.4)
    begun, others = time.monotonic(), psutil.Process().children()
    run(late, [replace(endless, name="endless too", keys={**endless.keys, "name": "endless too"}), last])
    assert time.monotonic() - begun < 60 and set(psutil.Process().children()) <= set(others)
    assert all(entry["of"]["name"] != "endless too" for entry in late.entries)


def test_nothing_begins_when_the_minutes_are_over(tmp_path):
    over = site(tmp_path, minutes=0.0)
    run(over, every_case())
    assert over.entries == [] and over.launches == 0


def test_the_order_has_every_case_once_and_the_published_rows_first():
    names = [case.name for case in every_case()]
    assert len(names) == len(set(names)) and {*FEWER, *LAWS} < set(names)
    assert names[:4] == list(PUBLISHED)[:4]
