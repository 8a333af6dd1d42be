"""Whom a report of stragglers names: those slower than ranks with the same work, never a stage that has more of it."""

from megatron_prism.engine.stragglers import Work, slowest


def _work(rank: int, forward: float, data: float = 0.0, stage: int = 0) -> Work:
    return Work(rank, stage, "gpu-1", forward, data)


def test_the_slowest_comes_first_and_is_held_to_the_median_of_its_stage() -> None:
    first, *others = slowest([_work(0, 1.0), _work(1, 1.1), _work(2, 1.0, data=1.0), _work(3, 1.0)])
    assert (first.work.rank, first.ratio, first.peers_seconds, first.peers_data) == (2, 2.0, 1.0, 0.0)
    assert all(one.ratio < 1.11 for one in others)
    assert "slow: rank 2 (gpu-1, pipeline stage 0) needs 2.000 s" in first.line() and "waiting for data +1.000 s" in first.line()


def test_where_passes_are_timed_whole_the_line_says_so() -> None:
    first = slowest([_work(0, 1.0), _work(1, 2.0)])[0]
    assert "times its peers' 1.000 s: forward +1.000 s" in first.line()
    assert "times its peers' 1.000 s: forward and backward +1.000 s" in first.line("forward and backward")


def test_a_stage_with_more_layers_is_not_slow() -> None:
    found = slowest([_work(0, 1.0), _work(1, 1.0), _work(2, 3.0, stage=1), _work(3, 3.0, stage=1)])
    assert {one.ratio for one in found} == {1.0}


def test_of_two_ranks_the_faster_one_is_the_measure() -> None:
    first, second = slowest([_work(0, 1.0), _work(1, 2.0)])
    assert (first.work.rank, first.ratio, second.ratio) == (1, 2.0, 1.0)
