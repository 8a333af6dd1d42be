"""The training stage as a user meets it: recipes, dry runs, stopping and going on, branches, validation, metrics."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_blend import write_tiny_blend
from training import VOCAB_SIZE, from_random, metrics, recipe

from megatron_prism import artifact
from megatron_prism.config import load_recipe
from megatron_prism.engine import loop, run_folder, run_lock, step
from megatron_prism.engine.metrics import MetricsLog
from megatron_prism.engine.recipe import TrainConfig
from megatron_prism.errors import UserError

THIRD_LOSS = 4.401173909505208
SETTINGS = {
    "steps": 6,
    "checkpoint__save_interval": 2,
    "checkpoint__keep_last": None,
    "validation__interval": 3,
    "validation__batches": 2,
    "log__tensorboard": True,
}


def config(root: Path, output: Path, **settings: Any) -> TrainConfig:
    start = {} if any(key.startswith("model") for key in settings) else from_random(root)
    return load_recipe(None, recipe(root, output, **start, **settings), TrainConfig)


def prism_train(arguments: list[str], **options: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "megatron_prism", "train", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONSAFEPATH": "1"}, check=False, **options)


pytestmark = pytest.mark.usefixtures("leave_groups")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run of six steps with everything on, and its folder of inputs."""
    root = tmp_path_factory.mktemp("finished")
    return root, loop.train(config(root, root / "run", **SETTINGS))


def test_a_finished_run_is_complete_and_says_what_it_was_made_from(finished):
    root, run = finished
    provenance = artifact.require(run, "train")
    assert provenance["versions"]["megatron-core"]
    assert len(run_folder.complete_steps(run)) == 3
    assert load_recipe(run / "config.toml", [], TrainConfig) == config(root, run, **SETTINGS)


def test_a_run_is_complete_only_after_its_log_is_closed(finished, tmp_path, monkeypatch, capsys):
    """TensorBoard's writer has a thread of its own: what it wrote after COMPLETE would be in no manifest."""
    root, _ = finished
    output, events, close, complete = tmp_path / "run", [], MetricsLog.close, artifact.complete
    monkeypatch.setattr(MetricsLog, "close", lambda log: (close(log), events.append("closed")))
    monkeypatch.setattr(artifact, "complete", lambda folder: (events.append(folder), complete(folder)))
    loop.train(config(root, output, steps=1))
    assert events == [run_folder.step_folder(output, 1), "closed", output]
    consumed = json.loads((run_folder.step_folder(output, 1) / "state.json").read_text())["progress"]["consumed"]
    shown = {line.split()[0]: line.split() for line in capsys.readouterr().err.splitlines() if line.count("%") == 2}
    assert {name: int(shown[name][3]) for name in consumed} == {name: each["samples"] for name, each in consumed.items()}, "its last words"


def test_metrics_tell_loss_rate_speed_and_each_source(finished):
    _, run = finished
    lines = metrics(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["loss"] > 0 and line["tokens_per_second"] > 0 and line["tflops_per_rank"] > 0 for line in lines)
    assert all(0 < line["data_wait_seconds"] < line["seconds_per_step"] for line in lines)
    assert lines[-1]["tokens"] == 6 * 8 * 32
    for line in lines:
        assert {"loss/code", "loss/math"} <= line.keys() or len(line) > 8
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert list((run / "tensorboard").glob("events.*"))


def test_validation_reads_the_held_out_split_and_leaves_training_alone(finished, tmp_path):
    root, run = finished
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validations = [line for line in lines if "validation/loss" in line]
    assert [line["step"] for line in validations] == [3, 6]
    assert validations[1]["validation/loss"] < validations[0]["validation/loss"]
    assert {"validation/loss/code", "validation/loss/math"} <= validations[0].keys()
    without = loop.train(config(root, tmp_path / "run", steps=6))
    assert [line["loss"] for line in metrics(without)] == [line["loss"] for line in metrics(run)]


def test_the_first_loss_is_the_plain_cross_entropy_over_unmasked_tokens(finished, tmp_path):
    """A direct computation on the first global batch, with the model's own logits."""
    root, _ = finished
    run = loop.build_run(config(root, tmp_path / "run", steps=1))
    batch = run.data.micro_batch(range(8))
    (chunk,) = run.engine.model
    chunk.eval()
    with torch.no_grad():
        logits = chunk(batch.tokens, batch.positions, None)[..., :VOCAB_SIZE].double()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none").view_as(batch.loss_mask)
    expected = float((losses * batch.loss_mask).sum() / batch.loss_mask.sum())
    chunk.train()
    run.log.close()
    assert step.train_step(run.engine, run.data, 0, 0.0, 0.0).loss == pytest.approx(expected, rel=1e-6)


def test_a_time_limit_saves_and_stops_and_the_same_command_goes_on(finished, tmp_path):
    root, run = finished
    stopped = loop.train(config(root, tmp_path / "run", steps=6, time_limit_minutes=1e-6))
    assert not artifact.is_complete(stopped)
    assert run_folder.newest(stopped) == run_folder.step_folder(stopped, 1)
    half_written = run_folder.step_folder(stopped, 5)
    half_written.mkdir()
    with run_lock.held(stopped):
        loop.train(config(root, tmp_path / "run", steps=6))
    assert artifact.is_complete(stopped) and not half_written.exists()
    assert [line["loss"] for line in metrics(stopped)] == [line["loss"] for line in metrics(run)]


def test_sigterm_saves_before_the_process_ends(finished, tmp_path):
    root, _ = finished
    output = tmp_path / "run"
    arguments = recipe(root, output, steps=100_000, **from_random(root))
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_prism", "train", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        end = time.monotonic() + 100
        while not (output / "metrics.jsonl").exists() or not metrics(output):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, "queue me again: neither finished nor failed"
    assert "start the same command again to go on" in said
    newest = run_folder.newest(output)
    assert newest is not None and int(newest.name.removeprefix("step_")) >= 1
    assert not artifact.is_complete(output)


def test_decay_branches_start_from_one_stable_checkpoint(finished, tmp_path):
    """Two runs that load everything go on at its step, data position and optimizer state, each with its own schedule."""
    root, _ = finished
    stable = {"schedule__kind": "wsd", "schedule__decay_steps": 50, "schedule__warmup_steps": 0}
    trunk = loop.train(config(root, tmp_path / "trunk", steps=4, schedule__decay_start=100, checkpoint__save_interval=2, **stable))
    start = run_folder.step_folder(trunk, 2)
    branch = {
        "model__checkpoint": str(start),
        "model__load": "all",
        "schedule__kind": "wsd",
        "schedule__warmup_steps": 0,
        "schedule__final_lr_fraction": 0.0,
    }
    constant = loop.train(config(root, tmp_path / "a", steps=4, schedule__decay_start=100, schedule__decay_steps=2, **branch))
    decayed = loop.train(config(root, tmp_path / "b", steps=4, schedule__decay_start=2, schedule__decay_steps=2, **branch))
    assert [line["step"] for line in metrics(constant)] == [3, 4]
    assert [line["loss"] for line in metrics(constant)] == [line["loss"] for line in metrics(trunk)][2:]
    assert [line["lr"] for line in metrics(decayed)] == pytest.approx([0.01, 0.005])


def test_weights_alone_start_at_step_0_with_a_fresh_optimizer(finished, tmp_path):
    root, run = finished
    again = loop.train(config(root, tmp_path / "run", steps=1, model__checkpoint=str(run), optimizer__lr=1e-9))
    assert metrics(again)[0]["tokens"] == 8 * 32
    assert metrics(again)[0]["loss"] < metrics(run)[0]["loss"] - 0.1


def test_other_data_than_the_checkpoint_saw_is_refused_with_the_difference(finished, tmp_path):
    root, run = finished
    other = write_tiny_blend(tmp_path / "data", VOCAB_SIZE, seed=8)
    with pytest.raises(UserError, match="seed was 7, now 8"):
        loop.train(config(root, tmp_path / "run", steps=8, model__checkpoint=str(run), model__load="all", data__blend=str(other)))


def test_a_flipped_byte_in_a_shard_stops_training_by_file_and_block(finished, tmp_path):
    root, _ = finished
    blend = write_tiny_blend(tmp_path / "data", VOCAB_SIZE)
    path = tmp_path / "data" / "code" / "train" / "shard_00000.bin"
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"shard_00000\.bin, block 0"):
        loop.train(config(root, tmp_path / "run", data__blend=str(blend)))


def test_token_ids_beyond_the_model_are_refused(finished, tmp_path):
    root, _ = finished
    blend = write_tiny_blend(tmp_path / "data", vocab_size=VOCAB_SIZE + 1)
    with pytest.raises(UserError, match="prepare it with the model's tokenizer"):
        loop.train(config(root, tmp_path / "run", data__blend=str(blend)))
    assert (tmp_path / "run" / "watchdog").is_dir(), "torch's record of a hang before the first step has a folder to go to"


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(finished, tmp_path, monkeypatch):
    root, _ = finished
    step_of = loop.train_step

    def poisoned(engine: Any, data: Any, first_sample: int, *rest: Any, **options: Any) -> Any:
        if first_sample == 3 * 8:
            for weight in engine.model[0].parameters():
                weight.data.fill_(float("nan"))
        return step_of(engine, data, first_sample, *rest, **options)

    monkeypatch.setattr(loop, "train_step", poisoned)
    with pytest.raises(step.DivergenceError, match=r"step 4: loss nan.*samples 24 to 31"):
        loop.train(config(root, tmp_path / "run", steps=6, checkpoint__save_interval=2))
    assert run_folder.newest(tmp_path / "run") == run_folder.step_folder(tmp_path / "run", 2)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("parallel.tp=3", "must divide num_attention_heads=4"),
        ("global_batch=0", "greater than 0"),
        ("optimizer.lrr=1", "did you mean optimizer.lr"),
        ("steps=many", "should be a valid integer"),
        ("model.checkpoint=somewhere", "give exactly one start"),
        ("data.blend=nowhere.toml", "nowhere.toml does not exist"),
        ("export.interval=3", "must be a multiple of checkpoint.save_interval"),
    ],
)
def test_bad_recipes_answer_at_once_with_one_message_and_status_2(tmp_path, override, words):
    begun = time.monotonic()
    found = prism_train([*recipe(tmp_path, tmp_path / "run", **from_random(tmp_path)), override])
    assert found.returncode == 2
    assert words in found.stderr
    assert "Traceback" not in found.stderr
    assert time.monotonic() - begun < 10  # under a second alone on the machine; tests/benchmarks/startup.py measures it
    assert not (tmp_path / "run").exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path):
    arguments = recipe(tmp_path, tmp_path / "run", **from_random(tmp_path), parallel__tp=2, parallel__pp=2)
    found = prism_train([*arguments, "--dry-run"])
    assert found.returncode == 0, found.stderr
    for words in ("4 ranks: tp=2 pp=2 cp=1 dp=1", "weights", "gradients", "optimizer", "activations", "tokens       1,280", "model FLOPs"):
        assert words in found.stdout
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_the_first_schema_still_goes_on_and_exports(tmp_path):
    """tests/fixtures/checkpoint_v1 was written by version 0.1.0 after two steps; its third step had this loss."""
    fixture = Path(__file__).parents[1] / "fixtures" / "checkpoint_v1"
    settings = {"model__checkpoint": str(fixture), "model__load": "all", "export__dtype": "float32"}
    run = loop.train(config(tmp_path, tmp_path / "run", steps=3, **settings))
    assert metrics(run)[0]["step"] == 3
    assert metrics(run)[0]["loss"] == pytest.approx(THIRD_LOSS, rel=1e-5)
    assert (run / "hf" / "model.safetensors").is_file()


def test_sources_of_different_tokenizers_are_refused(finished, tmp_path):
    root, _ = finished
    blend = write_tiny_blend(tmp_path / "data", VOCAB_SIZE)
    manifest = tmp_path / "data" / "math" / "train" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("0" * 64, "1" * 64))
    with pytest.raises(UserError, match="different tokenizers"):
        loop.train(config(root, tmp_path / "run", data__blend=str(blend)))


def test_a_run_that_diverges_says_where_in_one_message_and_exits_with_status_1(tmp_path):
    found = prism_train(recipe(tmp_path, tmp_path / "run", **from_random(tmp_path), optimizer__lr=1e30, schedule__warmup_steps=0))
    assert found.returncode == 1 and "Traceback" not in found.stderr
    assert re.search(r"error: step 2: loss .*samples 8 to 15. NaN first in the \w+ward pass of micro-batch 0: .*layer", found.stderr)
