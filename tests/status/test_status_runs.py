"""`prism status` of runs: real ones that were stopped, killed and finished, and logs as a reader meets them in the middle of a write."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from prism_command import prism
from report_cases import make, policy, trained, training_lines
from training import from_random, recipe

from megatron_prism import artifact
from megatron_prism.config import load_recipe
from megatron_prism.engine import loop, run_folder
from megatron_prism.engine.log_settings import LogConfig
from megatron_prism.engine.metrics import MetricsLog
from megatron_prism.engine.recipe import TrainConfig
from megatron_prism.errors import UserError
from megatron_prism.status import life, log, run, text
from megatron_prism.status.command import look, one_output
from megatron_prism.status.said import Status

pytestmark = pytest.mark.usefixtures("leave_groups")
SETTINGS = {"checkpoint__save_interval": 4, "validation__interval": 3, "validation__batches": 1}


def _alive(folder: Path, lines: list[dict[str, Any]], **config: Any) -> Path:
    """A run of training that began a minute ago and wrote these lines just now."""
    make(folder, "train", files={"metrics.jsonl": lines}, finished=False, steps=100, **config)
    artifact.annotate(folder, started_at="2026-01-01T00:00:00+00:00")
    return folder


def _lines(steps: int, ended: float, seconds: float = 1.0) -> list[dict[str, Any]]:
    """Steps of so many seconds, the last one logged at a time."""
    return [{**line, "seconds_per_step": seconds, "time": ended - (steps - line["step"]) * seconds} for line in training_lines(steps)]


# --- real runs ---------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A real training: what the command says while it runs, after kill -9, and after it was taken up and finished."""
    root = tmp_path_factory.mktemp("killed")
    words = recipe(root, root / "run", **from_random(root), **{**SETTINGS, "steps": 300})
    with subprocess.Popen([sys.executable, "-m", "megatron_prism", "train", *words], stderr=subprocess.PIPE) as process:
        seen = b""
        while b"step 6/300" not in seen:
            line = process.stderr.readline()
            assert line, seen
            seen += line
        found: dict[str, Any] = {"running": prism("status", root / "run"), "json": prism("status", root / "run", "--json")}
        process.kill()
        process.wait()
    found["step"] = run_folder.newest(root / "run"), log.read(root / "run").lines[-1]["step"]
    found["dead"] = look(root / "run", time.time() + 3600)
    last = found["step"][1]
    loop.train(load_recipe(None, [word.replace("steps=300", f"steps={last + 3}") for word in words], TrainConfig))
    return found | {"finished": look(root / "run", time.time()), "last": last + 3}


def test_a_run_is_seen_while_it_runs(killed):
    done, printed = killed["running"], killed["running"].stdout
    assert done.returncode == 0 and "running" in printed and "of 300 steps" in printed and "ETA" in printed, done.stderr
    for label in ("loss", "by source", "validation", "optimizer", "speed", "goodput", "checkpoint  step", "alarms      none"):
        assert label in printed
    (found,) = json.loads(killed["json"].stdout)["outputs"]
    assert (found["state"], found["total"], found["unit"]) == ("running", 300, "steps") and 6 <= found["done"] < 300
    assert found["facts"]["checkpoint"]["step"] % 4 == 0 and 0 < found["facts"]["goodput"] < 1
    assert set(found["facts"]["by_source"]) == {"code", "math"} and found["where"]["ranks"] == 1


def test_a_killed_run_is_dead_once_it_was_silent_for_too_long_and_says_what_is_lost(killed):
    checkpoint, last = killed["step"]
    found = killed["dead"]
    saved = int(checkpoint.name.removeprefix("step_"))
    if saved == last:  # killed just behind a save: nothing is lost
        assert found.state == "stopped"
        return
    assert found.state == "dead" and found.exit == 3
    assert f"newest checkpoint is of step {saved}, its log ends at step {last}" in found.why


def test_a_run_that_was_taken_up_counts_its_sessions_and_not_its_lost_time_as_good(killed):
    found = killed["finished"]
    assert (found.state, found.exit, found.done, found.where["sessions"]) == ("finished", 0, killed["last"], 2)
    steps = log.steps_of(log.read(found.folder).lines)
    useful = sum(line["seconds_per_step"] for line in steps)  # log.interval is 1
    assert found.facts["goodput"] == pytest.approx(useful / found.facts["wall_seconds"])
    assert found.facts["goodput"] + sum(found.facts["shares"][key] for key in ("saving", "evaluation", "rest")) == pytest.approx(1)


def test_a_run_at_its_time_limit_is_stopped_at_once_and_an_error_is_a_failure(tmp_path):
    start = from_random(tmp_path)
    loop.train(load_recipe(None, recipe(tmp_path, tmp_path / "run", **start, time_limit_minutes=1e-6), TrainConfig))
    found = look(tmp_path / "run", time.time())
    assert (found.state, found.exit, found.done) == ("stopped", 4, 1) and "step 1" in found.why
    writer = MetricsLog(tmp_path / "run", LogConfig(), 1, 5, enabled=True, settings={})
    with pytest.raises(UserError):
        try:
            raise UserError("the loss of step 2 is no number\nand more")
        finally:
            writer.close()
    found = look(tmp_path / "run", time.time())
    assert (found.state, found.exit, found.why) == ("failed", 3, "UserError: the loss of step 2 is no number")
    assert found.alarms[0].what == "error"


# --- a log in the middle of a write ------------------------------------------------------------------------------------------------------------


def test_half_a_last_line_is_not_read_and_every_cut_of_a_log_is_survived(tmp_path):
    folder = _alive(tmp_path / "run", _lines(4, time.time()))
    path = folder / "metrics.jsonl"
    data = path.read_bytes()
    for cut in range(0, len(data), 7):
        path.write_bytes(data[:cut])
        found = one_output(folder, time.time())
        whole = data[:cut].count(b"\n")
        assert (found.done, found.state, found.alarms) == (whole, "running" if whole else "starting", []), cut
        assert text.block(found)


def test_rubbish_in_a_log_is_counted_and_left_out(tmp_path):
    lines = _lines(3, time.time())
    folder = _alive(tmp_path / "run", lines)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"\x00\xff\n[1]\n{}\n" + json.dumps({**lines[-1], "step": 4, "loss": float("nan")}).encode() + b"\n")
    found = one_output(folder, time.time())
    assert found.done == 4 and {alarm.what for alarm in found.alarms} == {"not a number", "log"}
    assert json.loads(json.dumps(found.as_table(), allow_nan=False))["facts"]["loss"] is None


def test_a_log_of_an_older_version_still_gives_its_speed(tmp_path):
    """Without seconds_per_step: from the times of the lines."""
    now = time.time()
    folder = _alive(tmp_path / "run", [{**line, "time": now - 20 + 2 * line["step"]} for line in training_lines(10)])
    found = one_output(folder, now)
    assert found.state == "running" and found.eta_seconds == pytest.approx(180, abs=1)
    assert found.facts["mean_tokens_per_second"] == pytest.approx(4000)


def test_a_huge_log_is_read_at_both_ends_alone(tmp_path, monkeypatch):
    folder = _alive(tmp_path / "run", _lines(2000, time.time()))
    whole = one_output(folder, time.time())
    monkeypatch.setattr(log, "HEAD_BYTES", 20_000)
    monkeypatch.setattr(log, "TAIL_BYTES", 20_000)
    read = log.read(folder)
    assert (read.lines[0]["step"], read.lines[-1]["step"], read.broken) == (1, 2000, 0) and len(read.lines) < 500
    assert one_output(folder, time.time()).facts["wall_seconds"] == pytest.approx(whole.facts["wall_seconds"], abs=5)


# --- how long a run may be silent --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("silent", "state"), [(250, "running"), (1000, "dead")])
def test_silence_is_measured_by_the_steps_between_two_lines(tmp_path, silent, state):
    """A line every 10 steps of 10 s: 3 x 100 s."""
    now = time.time()
    folder = _alive(tmp_path / "run", _lines(30, now, seconds=10.0), log={"interval": 10})
    assert one_output(folder, now + silent).state == state


def test_a_run_that_saves_for_long_is_not_taken_for_dead(tmp_path):
    now = time.time()
    folder = _alive(tmp_path / "run", [*_lines(30, now), {"step": 30, "checkpoint_seconds": 600.0, "time": now}])
    assert one_output(folder, now + 1500).state == "running"


def test_a_new_session_is_starting_whatever_the_one_before_it_ended_with(tmp_path):
    now = time.time()
    folder = _alive(tmp_path / "run", [*_lines(5, now - 900), {"step": 5, "error": "OSError: disk", "time": now - 900}])
    assert one_output(folder, now).state == "failed"
    artifact.annotate(folder, started_at=life.time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(now)))
    found = one_output(folder, now + 600)
    assert (found.state, found.alarms) == ("starting", [])


# --- alarms ------------------------------------------------------------------------------------------------------------------------------------


def test_what_was_left_in_the_folder_is_an_alarm(tmp_path):
    folder = _alive(tmp_path / "run", _lines(9, time.time()))
    records = {"step_00000003": {"step": 3, "loss": "nan", "rank": 5}, "step_00000007": {"step": 7, "action": "skip", "message": "step 7: loss nan"}}
    records["step_00000008_rollback_1"] = {"step": 8, "rollback": 1, "message": "step 8: loss 9 is far: back to step 4"}
    for name, record in records.items():
        artifact.write_atomic(folder / "bad_steps" / f"{name}.json", json.dumps(record))
    artifact.write_atomic(folder / "watchdog" / "rank_3.txt", "rank 3 waits in all_reduce since 600 s\nstack")
    folder.with_name("run.failures").write_text("after step_00000004\n")
    alarms = one_output(folder, time.time()).alarms
    kinds = [("rollback", 8), ("bad step", 7), ("bad step", 3), ("watchdog", None), ("failures", None)]
    assert [(alarm.what, alarm.step) for alarm in alarms] == kinds
    assert [alarm.text for alarm in alarms[:3]] == ["loss 9 is far: back to step 4", "loss nan; the step was left out", "loss nan  rank 5"]
    assert "rank 3 waits in all_reduce" in alarms[3].text


def test_a_run_of_rl_shows_its_reward_and_what_is_above_a_limit(tmp_path):
    folder = policy(tmp_path / "rl", [])
    config = (folder / "config.toml").read_text()
    artifact.write_atomic(folder / "config.toml", config + "\n[alarms]\nkl_above = 0.01\nmismatch = 0.3\ntruncated_above = 'none'\n")
    found = one_output(folder, time.time())
    assert [alarm.what for alarm in found.alarms] == ["kl"] and "alarms.kl_above=0.01" in found.alarms[0].text
    printed = text.block(found)
    assert "reward" in printed and "by domain" in printed and "KL" in printed and found.facts["curve"]["of"] == "reward"


def test_curve_and_trend_are_means_of_lines(tmp_path):
    steps = [{"step": number, "loss": 2.0 if number <= 60 else 1.0, "grad_norm": 1.0} for number in range(1, 81)]
    curve = run._curve(steps, "loss")["curve"]
    assert curve["points"] == [2.0] * 30 + [1.0] * 10
    assert (curve["lines_compared"], curve["mean_before"], curve["mean_now"]) == (10, 1.0, 1.0)
    assert text.spark([1.0, 2.0]) in ("▁█", "_^") and text.spark([1.0, 1.0]) in ("▁▁", "__")


# --- what is no run ----------------------------------------------------------------------------------------------------------------------------


def test_what_is_no_output_is_named(tmp_path):
    trained(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    for place, said in (
        ("nothing", "does not exist"),
        ("run/metrics.jsonl", "is a file"),
        ("empty", "is an empty folder"),
        ("hf", "is a Hugging Face model"),
        ("run/checkpoints", "the run is"),
    ):
        with pytest.raises(UserError, match=said) as error:
            if place == "run/checkpoints":  # without their marks they are no outputs of their own
                for path in (tmp_path / place).glob("*/provenance.json"):
                    path.unlink()
            look(tmp_path / place, time.time())
        assert str(tmp_path / place) in str(error.value)


def test_a_broken_output_is_unreadable_and_the_others_are_shown(tmp_path):
    trained(tmp_path / "good")
    trained(tmp_path / "bad")
    (tmp_path / "bad" / "provenance.json").write_text('{"kind": "tr')
    done = prism("status", tmp_path / "bad", tmp_path / "good")
    assert done.returncode == 3 and "unreadable" in done.stdout and "finished" in done.stdout and not done.stderr


def test_it_watches_until_all_is_finished(tmp_path):
    folder = _alive(tmp_path / "run", _lines(100, time.time()))
    command = [sys.executable, "-m", "megatron_prism", "status", str(folder), "--watch", "--every", "0.2", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONSAFEPATH": "1"}) as watching:
        for _ in range(2):
            assert json.loads(watching.stdout.readline())["outputs"][0]["state"] == "running"
        artifact.complete(folder)
        *_, last = watching.stdout.readlines()
    assert json.loads(last)["outputs"][0]["state"] == "finished" and watching.returncode == 0


def test_it_answers_at_once_and_without_torch(tmp_path):
    trained(tmp_path / "run")
    code = (
        "import sys, time; from pathlib import Path; begun = time.perf_counter()\n"
        "from megatron_prism.status import command\n"
        f"command.show([Path({str(tmp_path / 'run')!r})], False, None)\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)\n"
        "print(time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[-1]) < 1.0


def test_an_output_that_changes_while_it_is_read_is_no_crash(tmp_path):
    """A run's folder is removed and made again under a reader."""
    statuses: list[Status] = []
    for _ in range(3):
        folder = _alive(tmp_path / "run", _lines(2, time.time()))
        statuses.append(one_output(folder, time.time()))
        shutil.rmtree(folder)
        assert one_output(folder, time.time()).state == "unreadable"
    assert {one.state for one in statuses} == {"running"}
