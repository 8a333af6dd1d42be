"""Generation one step ahead: what is written has weights that are a step old, a resumed run is the unbroken one, servers write
meanwhile."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import rl_runs
import torch
from fake_vllm import stand_in
from training import differing, final_state

from megatron_prism import artifact
from megatron_prism.engine import checkpoint, parallel, run_folder
from megatron_prism.errors import UserError
from megatron_prism.evals.frames import write_all
from megatron_prism.generate.interface import Scored
from megatron_prism.generate.vllm_server import PYTHON
from megatron_prism.grading import Question
from megatron_prism.rl import ahead, loop
from megatron_prism.rl.records import Prompt, Response
from megatron_prism.rl.rollouts import Draw, RolloutConfig

AHEAD = {"rollout__steps_ahead": 1, "samples__interval": 1, "checkpoint__save_interval": 2, "checkpoint__keep_last": None}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rl_runs.make_inputs(tmp_path_factory.mktemp("ahead"))


@pytest.fixture(autouse=True, scope="module")
def leave_groups():
    yield
    parallel.stop()


@pytest.fixture(scope="module")
def unbroken(root: Path) -> Path:
    return loop.reinforce(rl_runs.config(root, root / "unbroken", **AHEAD))


def texts(run: Path, step: int) -> list[str]:
    return [one["text"] for one in rl_runs.samples(run, step)]


def test_a_step_trains_on_what_the_weights_before_its_own_wrote(root, unbroken):
    """A run whose rate is 1e-30 never leaves its first weights: they write the first two steps of a run ahead, and no third."""
    still = loop.reinforce(rl_runs.config(root, root / "still", **{**AHEAD, "rollout__steps_ahead": 0, "optimizer__lr": 1e-30, "steps": 3}))
    assert [{one["weights_version"] for one in rl_runs.samples(unbroken, step)} for step in (1, 2, 3, 4)] == [{0}, {0}, {1}, {2}]
    assert [texts(unbroken, step) == texts(still, step) for step in (1, 2, 3)] == [True, True, False]


def test_the_mismatch_is_that_of_equal_weights_and_the_lag_has_a_figure_of_its_own(unbroken):
    found = rl_runs.lines(unbroken)
    assert [line["lag"] for line in found] == [0, 1, 1, 1]
    assert max(line["mismatch"] for line in found) < 1e-5
    assert found[0]["lag_mismatch"] < 1e-5 < 1e-3 < min(line["lag_mismatch"] for line in found[1:]), "the policy moved a step"
    assert found[1]["ratio"] == 1.0, "one update: the clip is inert, the importance weight holds the lag"


def test_a_resumed_run_ahead_equals_the_unbroken_run_bit_for_bit(root, unbroken, tmp_path):
    run = shutil.copytree(unbroken, tmp_path / "run")
    (run / artifact.COMPLETE).unlink()
    checkpoint.remove(run_folder.step_folder(run, 4))
    assert (run_folder.step_folder(run, 2) / ahead.FILE).is_file()
    loop.reinforce(rl_runs.config(root, run, **AHEAD))
    assert rl_runs.numbers(run) == rl_runs.numbers(unbroken)
    assert [line["lag"] for line in rl_runs.lines(run)] == [0, 1, 1, 1]
    assert [rl_runs.samples(run, step) for step in (3, 4)] == [rl_runs.samples(unbroken, step) for step in (3, 4)]
    assert differing(final_state(run), final_state(unbroken)) == []


def test_responses_that_are_not_resumed_break_the_equality(root, unbroken, tmp_path, monkeypatch):
    """Written anew they would be of the weights that the run goes on with."""
    monkeypatch.setattr(ahead.Ahead, "load", lambda *_: None)
    run = shutil.copytree(unbroken, tmp_path / "run")
    (run / artifact.COMPLETE).unlink()
    checkpoint.remove(run_folder.step_folder(run, 4))
    loop.reinforce(rl_runs.config(root, run, **AHEAD))
    assert rl_runs.numbers(run) != rl_runs.numbers(unbroken)


def test_responses_of_another_group_size_are_written_anew(tmp_path):
    """Taken up, they would be cut into groups of the new size, in which answers to different prompts would be compared."""
    question = Question("a", "contains", "", {})
    prompts = [Prompt(f"word/{number}", "words", question, (1, 2)) for number in range(2)]

    def draw(size: int, version: int = 2) -> Draw:
        return Draw(prompts, RolloutConfig(responses_per_prompt=size, context=8), 5, 2, version, writers=1)

    parallel.start(torch.device("cpu"))  # whether there is a file is one rank's word

    written = [{"sample": sample, "tokens": [3], "written": [True], "logprobs": [-1.0], "text": "a"} for _, sample in draw(2).pairs]
    rest = {"finish_reason": "stop", "weights_version": 1}
    lines = [{"place": place, **line, **rest} for (place, _), line in zip(draw(2).pairs, written, strict=True)]
    write_all(tmp_path / ahead.FILE, [{"step": 2, "seconds": 1.0}, *lines])
    found = {}
    for size in (2, 4):
        waiting = ahead.Ahead()
        waiting.load(tmp_path, lambda step, size=size: draw(size))
        found[size] = waiting.take(2)
    assert found[4] is None
    assert found[2] is not None and found[2].draw.version == 1, "written by the weights of then"


def test_servers_write_while_the_trainer_works(root, tmp_path, monkeypatch):
    """Nobody waits for the next step's responses before the trainer's turn; in it all sixteen are written, at 0.1 s each."""
    for name, value in ((PYTHON, stand_in(tmp_path)), ("FAKE_SECONDS", "0.1")):
        monkeypatch.setenv(name, str(value))
    right, written = loop._update, []

    def slow(run: loop.Run, batch: Any) -> Any:
        parts = run.ahead._parts
        written.append(None if parts is None else len(parts.result(timeout=100)[0]))
        return right(run, batch)

    monkeypatch.setattr(loop, "_update", slow)
    settings = {**AHEAD, "generation__backend": "vllm", "generation__batch_size": 4, "alarms__mismatch": None, "steps": 3}
    run = loop.reinforce(rl_runs.config(root, tmp_path / "run", **settings))
    assert [{one["weights_version"] for one in rl_runs.samples(run, step)} for step in (1, 2, 3)] == [{0}, {0}, {1}]
    assert written == [16, 16, None], "after the last step nothing is written"


def test_the_probe_looks_at_responses_to_all_prompts():
    question = Question("a", "contains", "", {})
    prompts = [Prompt(str(number), "words", question, (number,)) for number in range(40)]
    responses = [Response(prompt, sample, (3,), (True,), (-1.0,), "a", "stop", 1) for prompt in prompts for sample in range(4)]
    asked: list[Any] = []

    class Scorer:
        longest_pair = None

        def score(self, pairs: Any) -> list[Scored]:
            asked.extend(prompt[0] for prompt, _ in pairs)
            return [Scored((-1.5,), False)] * len(pairs)

    parallel.start(torch.device("cpu"))
    off = ahead.mismatch(responses, Scorer(), lambda chosen: [[0.0, -1.0]] * len(chosen))  # type: ignore[arg-type]
    assert off == 0.5 and len(asked) <= ahead.PROBES and max(asked) - min(asked) > 30 and len(set(asked)) == len(asked)


def test_responses_of_older_weights_need_an_importance_weight(root, tmp_path):
    with pytest.raises(UserError, match="nothing corrects for it"):
        rl_runs.config(root, tmp_path / "run", rollout__steps_ahead=1, objective__importance_cap=None)


def test_servers_that_sleep_cannot_write_meanwhile(root, tmp_path):
    settings = {"generation__backend": "vllm", "generation__server_flags__enable-sleep-mode": True, "rollout__steps_ahead": 1}
    with pytest.raises(UserError, match="servers cannot sleep meanwhile"):
        rl_runs.config(root, tmp_path / "run", **settings)


def test_servers_on_the_trainers_gpus_are_refused(root, tmp_path):
    settings = {"generation__backend": "vllm", "rollout__steps_ahead": 1, "device": "cuda"}
    with pytest.raises(UserError, match="needs servers on other GPUs than the trainer's"):
        rl_runs.config(root, tmp_path / "run", **settings)
