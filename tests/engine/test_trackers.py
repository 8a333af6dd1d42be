"""Programs beside metrics.jsonl that a run is told to: a run that is started again goes on in theirs, and none of them ends or delays it."""

import json
import logging
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import from_random, recipe

from megatron_prism import artifact
from megatron_prism.config import load_recipe
from megatron_prism.engine import loop, trackers
from megatron_prism.engine.log_settings import LogConfig
from megatron_prism.engine.metrics import MetricsLog, read_records
from megatron_prism.engine.recipe import TrainConfig
from megatron_prism.engine.trackers import ROLLED_BACK_FROM
from megatron_prism.errors import UserError


def opened(run: Path, first_step: int, **asked: object) -> MetricsLog:
    return MetricsLog(run, LogConfig(**asked), first_step, 10, enabled=True, settings={"steps": 10})


def one_session(run: Path, steps: range, **asked: object) -> None:
    log = opened(run, steps.start - 1, **asked)
    for step in steps:
        log.event(step, {"loss": float(step)}, "")
    log.close()


def one_with_a_rollback(run: Path, **asked: object) -> None:
    log = opened(run, 0, **asked)
    for step in range(1, 7):
        log.event(step, {"loss": 10.0 + step}, "")
    log.take_back(3)
    log.event(3, {"rollback": {"from_step": 6}, ROLLED_BACK_FROM: 6}, "")
    for step in (4, 5):
        log.event(step, {"loss": float(step)}, "")
    log.close()


def in_tensorboard(run: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def in_wandb(file: Path, name: str) -> list[tuple[int, float]]:
    """What W&B's own file of a session has, as it would be uploaded."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for data in written_records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        line = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
        if name in line:
            found.append((line["step"], line[name]))
    return found


def written_records(data: bytes) -> Iterator[bytes]:
    """Of LevelDB's log format: blocks of 32 KiB, pieces with checksum (4 bytes), length (2) and kind (1: whole; 2, 3, 4: first, middle, last)."""
    place, parts = 7, b""  # after W&B's own header
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.fixture
def mlflow_store(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("GIT_PYTHON_REFRESH", "quiet")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    yield tmp_path / "store"
    mlflow.set_tracking_uri(None)


def in_mlflow(run: Path, name: str) -> list[tuple[int, float]]:
    import mlflow

    known = json.loads((run / trackers.IDS).read_text())["mlflow"]["id"]
    return [(value.step, value.value) for value in mlflow.MlflowClient().get_metric_history(known, name)]


def test_tensorboard_tells_one_history_through_a_rollback_and_a_restart(tmp_path):
    one_with_a_rollback(tmp_path, tensorboard=True)
    assert in_tensorboard(tmp_path, "loss") == [(1, 11.0), (2, 12.0), (3, 13.0), (4, 4.0), (5, 5.0)]
    assert in_tensorboard(tmp_path, ROLLED_BACK_FROM) == [(3, 6.0)]
    log = opened(tmp_path, 4, tensorboard=True)  # the run was killed, and goes on from step 4
    log.event(5, {"loss": 50.0}, "")
    log.close()
    assert in_tensorboard(tmp_path, "loss") == [(1, 11.0), (2, 12.0), (3, 13.0), (4, 4.0), (5, 50.0)]


@pytest.mark.usefixtures("offline")
def test_wandb_keeps_one_run_and_every_step_through_a_rollback_and_a_restart(tmp_path):
    one_with_a_rollback(tmp_path, wandb="team/project")
    time.sleep(1.1)  # W&B names a session's folder by the second
    one_session(tmp_path, range(5, 7), wandb="team/project")
    known = json.loads((tmp_path / trackers.IDS).read_text())["wandb"]
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert known["project"] == "team/project" and [file.stem for file in files] == [f"run-{known['id']}"] * len(files)
    assert in_wandb(files[0], "loss")[-3:] == [(6, 16.0), (4, 4.0), (5, 5.0)]
    assert in_wandb(files[0], ROLLED_BACK_FROM) == [(3, 6.0)]
    assert in_wandb(files[-1], "loss")[-2:] == [(5, 5.0), (6, 6.0)]


@pytest.mark.usefixtures("offline", "leave_groups")
def test_a_run_that_wandb_is_told_of_is_finished_and_stays_so(tmp_path):
    words = recipe(tmp_path, tmp_path / "run", steps=2, checkpoint__save_interval=2, log__wandb="project", **from_random(tmp_path))
    loop.train(load_recipe(None, words, TrainConfig))
    assert (tmp_path / "run" / "wandb" / "latest-run").is_symlink(), "what an artifact may not hold"
    artifact.require(tmp_path / "run")


def test_mlflow_keeps_one_run_through_a_restart(tmp_path, mlflow_store):
    (tmp_path / "run").mkdir()
    one_session(tmp_path / "run", range(1, 4), mlflow="experiment")
    one_session(tmp_path / "run", range(3, 6), mlflow="experiment")
    assert in_mlflow(tmp_path / "run", "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (3, 3.0), (4, 4.0), (5, 5.0)]


def test_a_store_that_fails_for_a_while_costs_its_lines_and_not_the_run(tmp_path, mlflow_store, caplog):
    (tmp_path / "run").mkdir()
    log = opened(tmp_path / "run", 0, mlflow="experiment")
    log.event(1, {"loss": 1.0}, "")
    wait_until(lambda: in_mlflow(tmp_path / "run", "loss") == [(1, 1.0)])
    mlflow_store.rename(tmp_path / "away")
    with caplog.at_level(logging.WARNING, logger=trackers.__name__):
        log.event(2, {"loss": 2.0}, "")
        log.event(3, {"loss": 3.0}, "")
        wait_until(lambda: log.trackers[0].lost == 2)
        if mlflow_store.exists():  # what the client made anew
            mlflow_store.rename(tmp_path / "made")
        (tmp_path / "away").rename(mlflow_store)
        log.event(4, {"loss": 4.0}, "")
        log.close()
    assert in_mlflow(tmp_path / "run", "loss") == [(1, 1.0), (4, 4.0)]
    assert [record["step"] for record in read_records(tmp_path / "run")] == [1, 2, 3, 4]
    said = [record.getMessage() for record in caplog.records if record.name == trackers.__name__]
    assert len(said) == 2 and "MLflow did not take a record" in said[0] and "it has missed 2" in said[1]


def test_a_server_that_is_not_there_refuses_a_run_that_begins_and_none_that_goes_on(tmp_path, monkeypatch, caplog):
    import mlflow

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    try:
        with pytest.raises(UserError, match=r"MLflow cannot be reached.*MLFLOW_TRACKING_URI"):
            opened(tmp_path, 0, mlflow="experiment")
        assert list(tmp_path.iterdir()) == []
        one_session(tmp_path, range(1, 3))
        with caplog.at_level(logging.WARNING, logger=trackers.__name__):
            one_session(tmp_path, range(3, 5), mlflow="experiment")
    finally:
        mlflow.set_tracking_uri(None)
    assert [record["step"] for record in read_records(tmp_path)] == [1, 2, 3, 4]
    assert "MLflow did not take a record" in caplog.text


class Stuck:
    """A server that takes the connection and never answers."""

    def take(self, record: trackers.Record, when: float) -> None:
        time.sleep(600)

    def end(self, failed: bool) -> None:
        raise AssertionError("never reached")


def test_trackers_that_hang_delay_no_step_and_the_end_no_longer_than_all_are_given_together(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(trackers, "TensorBoard", lambda run, first_step: Stuck())
    monkeypatch.setattr(trackers, "MLflow", lambda run, experiment, settings: Stuck())
    monkeypatch.setattr(trackers, "MOST_WAITING", 2)
    monkeypatch.setattr(trackers, "END_SECONDS", 0.5)
    log = opened(tmp_path, 0, tensorboard=True, mlflow="experiment")
    begun = time.monotonic()
    with caplog.at_level(logging.WARNING, logger=trackers.__name__):
        for step in range(1, 6):
            log.event(step, {"loss": 1.0}, "")
        log.close()
    assert time.monotonic() - begun < 10
    for name in ("TensorBoard", "MLflow"):
        assert f"{name} did not take a record (it takes none)" in caplog.text and f"{name} has not taken the last records" in caplog.text


def test_a_run_that_goes_on_finds_another_port_where_its_own_is_taken(tmp_path, capsys):
    holder = opened(tmp_path / "run", 0, prometheus=0) if (tmp_path / "run").mkdir() is None else None
    assert holder is not None and holder.endpoint is not None
    port = holder.endpoint.server.server_address[1]
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=f"log.prometheus={port}"):
        opened(tmp_path / "other", 0, prometheus=port)
    one_session(tmp_path / "other", range(1, 3))
    one_session(tmp_path / "other", range(3, 5), prometheus=port)
    holder.close()
    assert "the run goes on with a free port" in capsys.readouterr().err


def wait_until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.05)
