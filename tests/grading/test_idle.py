"""The lower bound on what a program was left to do as it pleased: the idlest processor's time, less what a quota took."""

import os
import time
from pathlib import Path

import pytest

from megatron_prism.grading.sandbox import idle
from megatron_prism.grading.sandbox.idle import Spare, idle_seconds, throttled_seconds

STAT = "cpu  9 9 9 {total} 9 9 9\ncpu0 1 2 3 {first} 5 6 7\ncpu1 1 2 3 {second} 5 6 7\nintr 5 0 0\nctxt 7\n"
TICKS = os.sysconf("SC_CLK_TCK")


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_idle_time_is_read_by_processor(tmp_path: Path) -> None:
    stat = written(tmp_path / "stat", STAT.format(total=900, first=3 * TICKS, second=5 * TICKS))
    assert idle_seconds(stat) == {0: 3.0, 1: 5.0}
    assert idle_seconds(tmp_path / "nowhere") == {}


@pytest.mark.parametrize(
    ("groups", "files", "seconds"),
    [
        ("0::/job/step\n", {"job/step/cpu.stat": "usage_usec 9\nthrottled_usec 1500000\n", "job/cpu.stat": "throttled_usec 500000\n"}, 2.0),
        ("0::/\n", {"cpu.stat": "usage_usec 9\nnr_throttled 3\nthrottled_usec 250000\n"}, 0.25),
        (
            "4:memory:/a\n1:cpu,cpuacct:/a\n",
            {"cpu/a/cpu.stat": "nr_throttled 1\nthrottled_time 3000000000\n", "a/cpu.stat": "throttled_usec 9\n"},
            3.0,
        ),
        ("0::/\n", {}, 0.0),
    ],
    ids=["with its parent", "in a container", "version 1", "none"],
)
def test_throttling_is_read_of_the_group_and_those_around_it(tmp_path: Path, groups: str, files: dict[str, str], seconds: float) -> None:
    for name, text in files.items():
        written(tmp_path / "root" / name, text)
    assert throttled_seconds(written(tmp_path / "cgroup", groups), tmp_path / "root") == seconds


@pytest.mark.parametrize(
    ("allowed", "throttled", "expected"), [({0, 1}, 0.0, 7.0), ({0}, 0.0, 2.0), ({0, 1}, 3.0, 4.0), ({0}, 3.0, 0.0), ({5}, 0.0, 0.0)]
)
def test_the_idlest_processor_that_may_be_used_counts(monkeypatch: pytest.MonkeyPatch, allowed: set[int], throttled: float, expected: float) -> None:
    readings, quotas = iter([{0: 10.0, 1: 20.0}, {0: 12.0, 1: 27.0}]), iter([1.0, 1.0 + throttled])
    monkeypatch.setattr(idle, "idle_seconds", lambda: next(readings))
    monkeypatch.setattr(idle, "throttled_seconds", lambda: next(quotas))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed)
    assert Spare().seconds() == expected


def test_of_this_machine_it_is_no_more_than_what_has_passed() -> None:
    begun, spare = time.monotonic(), Spare()
    time.sleep(0.3)
    assert 0.0 <= spare.seconds() <= time.monotonic() - begun + 2 / TICKS
