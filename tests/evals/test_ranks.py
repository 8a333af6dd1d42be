"""Ranks: shares that cover everything once, GPUs of their own, signs of life."""

import threading
import time
from pathlib import Path

import pytest

from megatron_prism.errors import UserError
from megatron_prism.evals import ranks as ranks_module
from megatron_prism.evals.progress import Lines
from megatron_prism.evals.ranks import Ranks
from megatron_prism.evals.responses import reopen_shares


def test_shares_cover_everything_once(tmp_path: Path) -> None:
    items = list(range(23))
    shares = [Ranks(tmp_path, rank, 5).share(items) for rank in range(5)]
    assert sorted(item for share in shares for item in share) == items
    assert {len(share) for share in shares} == {4, 5}


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("x", "2"), ("-1", "2"), ("1", "")])
def test_a_rank_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str, world: str) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(UserError, match="must lie in 0 to WORLD_SIZE - 1"):
        Ranks.of_environment(tmp_path, 1.0)


def _gpus(monkeypatch: pytest.MonkeyPatch, local: int, ranks: int, visible: str, count: int) -> str:
    import os

    for name, value in (("LOCAL_RANK", str(local)), ("LOCAL_WORLD_SIZE", str(ranks)), ("CUDA_VISIBLE_DEVICES", visible)):
        monkeypatch.setenv(name, value)
    Ranks(Path("out"), local, ranks).take_own_gpus(count)
    return os.environ["CUDA_VISIBLE_DEVICES"]


def test_each_rank_of_a_machine_sees_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [_gpus(monkeypatch, local, 4, "0,1,2,3", 1) for local in range(4)] == ["0", "1", "2", "3"]
    assert [_gpus(monkeypatch, local, 2, "4,5,6,7", 2) for local in range(2)] == ["4,5", "6,7"]
    assert _gpus(monkeypatch, 0, 1, "0,1,2,3", 1) == "0,1,2,3"
    with pytest.raises(UserError, match="4 ranks with 2 GPUs each need 8, this machine shows 4"):
        _gpus(monkeypatch, 0, 4, "0,1,2,3", 2)


def test_a_rank_that_lives_is_waited_for_longer_than_one_that_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(ranks_module, "POLL_SECONDS", 0.02)
    main, other = Ranks(tmp_path, 0, 2, patience_seconds=0.4), Ranks(tmp_path, 1, 2, patience_seconds=0.4)
    done: list[int] = []

    def work() -> None:
        with other.alive():
            time.sleep(1.2)
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    main.wait("the task", lambda: [] if done else [1])
    thread.join()
    started = time.monotonic()
    with pytest.raises(UserError, match="the task: rank 1 of 2 gave no sign of life for 0 s"):
        main.wait("the task", lambda: [1])
    assert 0.3 < time.monotonic() - started < 5
    assert not list(tmp_path.glob(".rank_1*"))


def test_ranks_start_when_they_have_seen_each_other_live_and_not_what_others_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(ranks_module, "POLL_SECONDS", 0.02)
    (tmp_path / ".rank_1.tmp").touch()  # of processes that were killed
    (tmp_path / ".rank_0.tmp").touch()
    ended = tmp_path / "parts" / "model" / "task" / "ended.1.json"
    ended.parent.mkdir(parents=True)
    ended.write_text("{}")
    seen: list[str] = []

    def run(rank: int) -> None:
        reopen_shares(tmp_path, rank)
        with Ranks(tmp_path, rank, 2, patience_seconds=20).together():
            seen.append(f"{rank}: {ended.exists()}")
            time.sleep(0.3)

    main, other = (threading.Thread(target=run, args=(rank,)) for rank in (0, 1))
    main.start()
    time.sleep(0.5)
    assert seen == []
    other.start()
    main.join()
    other.join()
    assert sorted(seen) == ["0: False", "1: False"]
    begun = time.monotonic()
    with Ranks(tmp_path, 0, 2, patience_seconds=0.3).together():  # the other one did its share before, and ended
        assert time.monotonic() - begun < 5
    with pytest.raises(UserError, match="the start: rank 0 of 2 gave no sign of life"), Ranks(tmp_path, 1, 2, patience_seconds=0.3).together():
        pass


def test_a_line_says_how_far_and_how_long_without_counting_what_was_there(capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    line = Lines("model: task", 100, 40, seconds=10, clock=lambda: now[0])
    for _ in range(10):
        now[0] += 2
        line(1)
    assert capsys.readouterr().out.splitlines() == [
        "model: task: 45 of 100 (40 were there), 0.50 a second, about 1 min 50 s left",
        "model: task: 50 of 100 (40 were there), 0.50 a second, about 1 min 40 s left",
    ]
    now[0] += 80
    line(50)
    assert capsys.readouterr().out == "model: task: 100 of 100 (40 were there), 0.60 a second, in 1 min 40 s\n"
