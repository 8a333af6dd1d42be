"""Evaluations as they happen: killed and started again, on several ranks, beside training, graded again, and what a model or a disk cannot take."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from prism_command import prism
from tiny_hf import make_tiny_model

from megatron_prism import artifact
from megatron_prism.config import validate
from megatron_prism.errors import UserError
from megatron_prism.evals.frames import records
from megatron_prism.evals.ranks import Ranks
from megatron_prism.stages import evaluate

TASK = 'name = "sums"\ndomain = "math"\ndataset = "chain_sum"\nnum_questions = 6\nmax_new_tokens = 8\n'


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model `one` and task files."""
    folder = tmp_path_factory.mktemp("evaluate_runs")
    make_tiny_model(folder / "one")
    (folder / "sums.toml").write_text(TASK)
    (folder / "talk.toml").write_text(TASK.replace('"sums"', '"talk"', 1) + "chat = true\n")
    return folder


def _recipe(place: Path, output: Path, task: str = "sums", **changes: Any) -> dict[str, Any]:
    models = [{"name": "one", "path": str(place / "one")}]
    return {"output": str(output), "models": models, "threads": 1, "tasks": {"names": [str(place / f"{task}.toml")], "grading_workers": 0}, **changes}


def _run(recipe: dict[str, Any]) -> dict[str, Any]:
    folder = evaluate.run(validate(recipe, evaluate.Config, where="test"))
    artifact.require(folder, "evaluate")
    return json.loads((folder / "scores.json").read_text())


SAMPLED = {"generation": {"n": 12, "temperature": 1.0, "batch_size": 2}}


def _texts(output: Path, model: str = "one") -> dict[tuple[str, int], str]:
    return {(record["id"], record["sample"]): record["text"] for record in records(output / "responses" / model / "sums.jsonl.zst")}


@pytest.fixture(scope="module")
def unbroken(place: Path) -> dict[tuple[str, int], str]:
    """The responses of a run that nothing happened to."""
    _run(_recipe(place, place / "unbroken", **SAMPLED))
    return _texts(place / "unbroken")


def _words(place: Path, output: Path) -> list[str]:
    words = ["evaluate", f"output={output}", f'models=[{{name = "one", path = "{place / "one"}"}}]', f'tasks.names=["{place / "sums.toml"}"]']
    settings = [f"generation.{key}={value}" for key, value in SAMPLED["generation"].items()]
    return ["megatron_prism", *words, "threads=1", "tasks.grading_workers=0", *settings]


def _start(launcher: list[str], words: list[str]) -> subprocess.Popen[str]:
    ours = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *launcher, "-m", *words], env=ours, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=250)
    assert process.returncode == 0, output
    return output


def _there(output: Path) -> int:
    return sum(1 for path in (output / "parts" / "one" / "sums").glob("responses.*") for _ in records(path))


def _wait_for_responses(output: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Until so many are on disk; a loaded machine takes minutes to start a process."""
    end = time.monotonic() + 240
    while _there(output) < count:
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(f"{_there(output)} responses of {count}: {process.communicate()[0]}")
        time.sleep(0.01)


def test_the_command_killed_with_9_goes_on_and_ends_as_an_unbroken_one(place: Path, unbroken: dict[tuple[str, int], str]) -> None:
    output = place / "killed"
    process = _start([], _words(place, output))
    _wait_for_responses(output, 8, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not artifact.is_complete(output)
    kept = _there(output)
    assert 8 <= kept < 72
    printed = _finish(_start([], _words(place, output)))
    assert "gave no answer in the asked format" in printed
    assert "(" + str(kept) + " were there)" in printed
    assert _texts(output) == unbroken
    assert not (output / "parts").exists()


@pytest.mark.slow
def test_two_ranks_under_torchrun_survive_the_death_of_one(place: Path, unbroken: dict[tuple[str, int], str]) -> None:
    output = place / "torchrun"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    process = _start(torchrun, _words(place, output))
    _wait_for_responses(output, 12, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _finish(process)
    assert _texts(output) == unbroken
    artifact.require(output, "evaluate")


def test_a_disk_that_fills_up_is_named_and_what_was_drawn_is_used(place: Path, unbroken: dict[tuple[str, int], str]) -> None:
    output = place / "full"
    recipe = json.dumps(_recipe(place, output, **SAMPLED))
    script = f"""
import json, resource, signal
from megatron_prism.config import validate
from megatron_prism.errors import UserError
from megatron_prism.stages import evaluate
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
cfg = validate(json.loads({recipe!r}), evaluate.Config, where="test")
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    evaluate.run(cfg)
except UserError as error:
    print(error)
"""
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=250).stdout
    assert "the disk is full" in printed
    assert "every finished response is kept" in printed
    assert 5 < _there(output) < 72
    _run(json.loads(recipe))
    assert _texts(output) == unbroken


def test_grading_again_changes_verdicts_without_generating(place: Path) -> None:
    output = place / "again"
    before = _run(_recipe(place, output))
    shutil.copytree(place / "one", place / "kept")
    path = output / "responses" / "one" / "sums.jsonl.zst"
    from megatron_prism.evals.frames import write_all

    found = list(records(path))
    artifact_text = [{**record, "text": f"Answer: {place}"} for place, record in enumerate(found)]
    task = evaluate.tasks_of(validate(_recipe(place, output), evaluate.Config, where="test"))[0]
    artifact_text[2]["text"] = f"Answer: {task.questions()[2].entry['answer']}"
    (output / "COMPLETE").unlink()
    write_all(path, artifact_text)
    after = _run(_recipe(place, output, regrade=True))
    assert before["models"]["one"]["tasks"]["sums"]["accuracy"] == 0
    assert after["models"]["one"]["tasks"]["sums"]["accuracy"] >= 1 / 6
    assert after["models"]["one"]["parameters"] == before["models"]["one"]["parameters"]
    assert [record["text"] for record in records(path)] == [record["text"] for record in artifact_text]


def test_grading_again_what_is_not_finished_is_refused_with_what_to_do(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = place / "nothing_yet"
    with pytest.raises(UserError, match=r"nothing_yet holds no scores of one by this recipe: start it without regrade=true first"):
        _run(_recipe(place, output, regrade=True))
    assert not output.is_dir() or not [path for path in output.iterdir() if path.suffix != ".tmp"]
    done = place / "unbroken_again"
    _run(_recipe(place, done))
    with pytest.raises(UserError, match="holds no scores of one by this recipe"):
        _run(_recipe(place, done, regrade=True, generation={"n": 2, "temperature": 1.0}))
    artifact.require(done, "evaluate")
    with monkeypatch.context() as ranks, pytest.raises(UserError, match="one process, not on 2 ranks"):
        ranks.setenv("WORLD_SIZE", "2")
        _run(_recipe(place, done, regrade=True, patience_seconds=0.5))
    artifact.require(done, "evaluate")
    with pytest.raises(UserError, match="the recipe has none"):
        _run({**_recipe(place, done, regrade=True), "tasks": None, "perplexity": {"blend": "x"}})


def test_another_way_of_drawing_is_not_mixed_with_what_is_there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = place / "mixed"
    _run(_recipe(place, output))
    (output / "COMPLETE").unlink()
    with pytest.raises(UserError, match=r"drawn otherwise .*max_new_tokens"):
        _run(_recipe(place, output, generation={"max_new_tokens": 5}))
    with monkeypatch.context() as other_rank, pytest.raises(UserError, match="gave no sign of life"):
        other_rank.setenv("RANK", "1")
        other_rank.setenv("WORLD_SIZE", "2")
        (output / "responses" / "one" / "sums.jsonl.zst").unlink()
        recipe = _recipe(place, output, generation={"max_new_tokens": 5}, patience_seconds=0.5)
        artifact.begin(output, "evaluate", validate(recipe, evaluate.Config, where="test"))  # rank 0 gets as far as that
        main = threading.Thread(target=_live_for, args=(output, 6.0))
        main.start()
        _run(recipe)
    main.join()
    assert not list(output.glob("parts/one/sums/responses.*"))
    again = _run(_recipe(place, output, generation={"batch_size": 3}))
    assert again["models"]["one"]["tasks"]["sums"]["num_questions"] == 6


def _live_for(output: Path, seconds: float) -> None:
    """Rank 0 of two, which does nothing."""
    with Ranks(output, 0, 2).alive():
        time.sleep(seconds)


def test_a_finished_output_of_a_task_or_model_that_changed_is_not_taken_for_current(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "one", tmp_path / "one")
    shutil.copy(place / "sums.toml", tmp_path)
    recipe = _recipe(tmp_path, tmp_path / "scores", generation={"max_new_tokens": 2})
    _run(recipe)
    (tmp_path / "sums.toml").write_text(TASK + 'prompt = "Add: {question}"\n')
    with pytest.raises(UserError, match=r"drawn otherwise \(prompt was"):
        _run(recipe)
    (tmp_path / "sums.toml").write_text(TASK)
    _run(recipe)
    make_tiny_model(tmp_path / "one", seed=5)
    with pytest.raises(UserError, match=r"drawn otherwise \(model was"):
        _run(recipe)


def test_a_model_without_a_chat_template_is_asked_plainly_and_counted_or_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = _run(_recipe(place, place / "plain", task="talk"))["models"]["one"]["tasks"]["talk"]
    assert (found["chat"], found["without_template"]) == (False, 6)
    assert "all 6 questions were asked without a chat template" in " ".join(capsys.readouterr().out.split())
    recipe = _recipe(place, place / "refused", task="talk")
    with pytest.raises(UserError, match=r"no chat template: add chat_template.jinja"):
        _run({**recipe, "tasks": {**recipe["tasks"], "without_chat_template": "refuse"}})
    recipe = _recipe(place, place / "said_plain", task="talk")
    found = _run({**recipe, "tasks": {**recipe["tasks"], "chat": False}})["models"]["one"]["tasks"]["talk"]
    assert found["without_template"] == 0


def test_a_context_that_is_too_short_is_refused_or_counted(place: Path) -> None:
    with pytest.raises(UserError, match="max_position_embeddings"):
        _run(_recipe(place, place / "shortened", generation={"max_new_tokens": 120}))
    rule = {"max_new_tokens": 120, "on_too_long": "shorten"}
    found = _run(_recipe(place, place / "shortened", generation=rule))["models"]["one"]["tasks"]["sums"]
    assert found["truncated"] >= found["out_of_context"] > 0
    rule = {"max_new_tokens": 120, "on_too_long": "truncate_left"}
    found = _run(_recipe(place, place / "cut", generation=rule))["models"]["one"]["tasks"]["sums"]
    assert found["prompts_cut"] == 1
    assert found["out_of_context"] == 0


def test_data_that_is_missing_is_named_before_anything_is_made(place: Path, tmp_path: Path) -> None:
    recipe = _recipe(place, tmp_path / "out")
    with pytest.raises(UserError, match="aime"):
        _run({**recipe, "tasks": {"names": ["aime24"], "data_dir": str(tmp_path)}})
    assert not (tmp_path / "out").exists() or not any(path.suffix != ".tmp" for path in (tmp_path / "out").iterdir())


@pytest.fixture(scope="module")
def checkpoint(place: Path) -> Path:
    """The model as a checkpoint of a run."""
    from megatron_prism.stages import convert

    recipe = {"direction": "import", "source": str(place / "one"), "output": str(place / "checkpoint")}
    return convert.run(validate(recipe, convert.Config, where="test"))


def test_a_run_is_followed_until_its_end_and_its_checkpoint_is_named(place: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = place / "run"
    (run / "checkpoints").mkdir(parents=True)

    def train() -> None:
        for step in (10, 20):
            time.sleep(0.3)
            shutil.copytree(checkpoint, run / "checkpoints" / f".step_{step}")
            (run / "checkpoints" / f".step_{step}").rename(run / "checkpoints" / f"step_{step:08d}")
        time.sleep(0.3)
        (run / "COMPLETE").write_text("{}")

    training = threading.Thread(target=train)
    training.start()
    follow = {"run": str(run), "poll_seconds": 0.05, "choose": "test"}
    found = _run(_recipe(place, place / "followed", follow=follow))
    training.join()
    assert list(found["models"]) == ["one", "step_10", "step_20"]
    assert found["choice"]["rule"] == "test"
    same = [found["models"][name]["tasks"]["sums"]["negative_logprob"] for name in found["models"]]
    assert same == pytest.approx([same[0]] * 3)
    assert not any(line["is_difference"] for line in found["comparisons"])
    for text in (capsys.readouterr().out, (place / "followed" / "table.md").read_text(), (place / "followed" / "report.html").read_text()):
        assert "the best on the test tasks themselves, as the paper chose" in " ".join(text.split())


def test_a_followed_series_that_was_stopped_keeps_what_the_run_has_removed_since(place: Path, checkpoint: Path) -> None:
    run, output = place / "run_2", place / "followed_2"
    shutil.copytree(checkpoint, run / "checkpoints" / "step_00000010")
    (run / "COMPLETE").write_text("{}")
    recipe = _recipe(place, output, follow={"run": str(run), "poll_seconds": 0.05}, models=[])
    before = _run(recipe)
    (output / "COMPLETE").unlink()
    (run / "checkpoints" / "step_00000010").rename(run / "checkpoints" / "step_00000020")
    after = _run(recipe)
    assert list(after["models"]) == ["step_10", "step_20"]
    assert after["models"]["step_10"] == before["models"]["step_10"]


def test_the_page_needs_nothing_but_itself(place: Path) -> None:
    import re

    _run(_recipe(place, place / "page"))
    page = (place / "page" / "report.html").read_text()
    assert not re.search(r"https?:|src=|@import|url\(|fetch\(", page)
    assert "prefers-color-scheme: dark" in page
    assert "<svg" in page
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert len(data) == 6
    assert {"prompt", "text", "reason", "answer", "model", "task"} <= data[0].keys()


def test_the_command_refuses_ranks_that_are_none(place: Path) -> None:
    done = prism(
        "evaluate", f"output={place / 'x'}", f'models=[{{name = "one", path = "{place / "one"}"}}]', 'tasks.names=["chain_sum"]', env={"RANK": "2"}
    )
    assert done.returncode == 2
    assert "RANK=2 must lie in 0 to WORLD_SIZE - 1" in done.stderr
