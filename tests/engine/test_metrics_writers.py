"""What writers beside metrics.jsonl show of steps that were taken back: TensorBoard tells one history, as metrics.jsonl does."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_prism.engine.metrics import ROLLED_BACK_FROM, LogConfig, MetricsLog


def opened(run: Path, first_step: int) -> MetricsLog:
    return MetricsLog(run, LogConfig(tensorboard=True), first_step, 10, enabled=True, settings={})


def shown(run: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_tells_one_history_through_a_rollback_and_a_restart(tmp_path: Path) -> None:
    log = opened(tmp_path, 0)
    for step in range(1, 7):
        log.event(step, {"loss": 10.0 + step}, "")
    log.take_back(3)
    log.event(3, {"rollback": {"from_step": 6}, ROLLED_BACK_FROM: 6}, "")
    for step in (4, 5):
        log.event(step, {"loss": float(step)}, "")
    log.close()
    assert shown(tmp_path, "loss") == [(1, 11.0), (2, 12.0), (3, 13.0), (4, 4.0), (5, 5.0)]
    assert shown(tmp_path, ROLLED_BACK_FROM) == [(3, 6.0)]
    log = opened(tmp_path, 4)  # the run was killed, and goes on from step 4
    log.event(5, {"loss": 50.0}, "")
    log.close()
    assert shown(tmp_path, "loss") == [(1, 11.0), (2, 12.0), (3, 13.0), (4, 4.0), (5, 50.0)]
