"""A run that met NaN or a jump of its loss ends with the very weights of one that never saw what was left out, also when it was killed meanwhile."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_steps_plants import POISON, SAMPLE, Plant, Planted, activation, gradient, weight
from bad_steps_plants import SPIKE as PLANTED_SPIKE
from torch.utils._python_dispatch import TorchDispatchMode
from training import differing, final_state, from_random, metrics, recipe

from megatron_prism import artifact
from megatron_prism.config import load_recipe
from megatron_prism.data_prep.history import recorded, without_window
from megatron_prism.engine import adamw, bad_steps, checkpoint, loop, recovery, run_folder
from megatron_prism.engine.recipe import TrainConfig
from megatron_prism.engine.step import DivergenceError, forward_backward, train_step
from megatron_prism.errors import FaultyMachineError, PassingDivergenceError

pytestmark = pytest.mark.usefixtures("leave_groups")
BATCH = 8
KEPT = ("step", "loss", "grad_norm", "lr", "tokens")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad_steps")


def config(root: Path, output: Path, **settings: Any) -> TrainConfig:
    return load_recipe(None, recipe(root, output, **from_random(root), **{"checkpoint__keep_last": None, **settings}), TrainConfig)


def train(cfg: TrainConfig, *plants: Plant) -> Path:
    with Planted(*plants):
        return loop.train(cfg)


def as_at(run: Path, step: int, to: Path) -> Path:
    """A run as it lies on disk when it is killed after its checkpoint of `step`."""
    shutil.copytree(run, to)
    (to / artifact.COMPLETE).unlink()
    for folder in run_folder.complete_steps(to):
        if int(folder.name.removeprefix("step_")) > step:
            checkpoint.remove(folder)
    return to


def lines(run: Path) -> list[list[float]]:
    return [[line[key] for key in KEPT] for line in metrics(run)]


def state(run: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = run_folder.read_state(run_folder.step_folder(run, step))["progress"]
    return found


# --- NaN -----------------------------------------------------------------------------------------------------------------------------------------

SPOILT = activation(1, "mlp.linear_fc1", rank=0, sample=SAMPLE)
"""in the second step"""


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16", "optimizer__split_master": True, "optimizer__moments": "bf16"}], ids=["fp32", "bf16"])
def test_a_step_of_nan_leaves_weights_moments_and_the_count_of_steps_as_they_were(root, tmp_path, settings):
    run = loop.build_run(config(root, tmp_path / "run", **settings))
    try:
        engine = run.engine
        SPOILT(run)

        def held() -> list[Any]:
            found = [weight.clone() for chunk in engine.model for weight in chunk.parameters()]
            for part in engine.optimizer.chained_optimizers:
                found += [tensor.clone() for state in part.optimizer.state.values() for tensor in state.values()]
            return [*found, *(torch.tensor(group["step"]) for group in engine.optimizer.param_groups)]

        assert train_step(engine, run.data, 0, 0.01, 0.1).applied
        before = held()
        report = train_step(engine, run.data, BATCH, 0.01, 0.1)
        assert not report.applied and report.grad_norm != report.grad_norm and report.loss != report.loss
        assert all(torch.equal(now, then) for now, then in zip(held(), before, strict=True))
        assert train_step(engine, run.data, 2 * BATCH, 0.01, 0.1).applied
        assert not all(torch.equal(now, then) for now, then in zip(held(), before, strict=True))
        assert {group["step"] for group in engine.optimizer.param_groups} == {2}
    finally:
        run.close()


class Waits(TorchDispatchMode):
    """Notes operators that read a tensor's value, for which a GPU would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal"):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_whether_a_step_is_usable_is_decided_without_reading_a_value(root, tmp_path, monkeypatch):
    """On a GPU that would be a wait. The update itself is left out: on a CPU it may look."""
    run = loop.build_run(config(root, tmp_path / "run"))
    updates: list[Any] = []
    monkeypatch.setattr(adamw, "adamw", lambda *args, gradient_scale, **_: updates.append(gradient_scale))
    try:
        for poisoned in (False, True):
            for chunk in run.engine.model:
                chunk.zero_grad_buffer()
            parts = forward_backward(run.engine, run.data, 0, forward_only=False)
            parts = parts * torch.nan if poisoned else parts
            with Waits() as waits:
                _, usable = run.engine.optimizer.step(parts)
            assert waits.seen == [] and bool(usable) is not poisoned
            assert {bool(scale.isnan()) for scale in updates} == {poisoned}
            updates.clear()
    finally:
        run.close()


def test_a_run_that_left_a_step_out_goes_on_bit_for_bit_from_before_it_and_from_after_it(root, tmp_path):
    settings = {"steps": 4, "checkpoint__save_interval": 1, "bad_steps__on_nan": "skip", "hidden_dropout": 0.1}
    run = train(config(root, tmp_path / "run", **settings), SPOILT)
    assert [line["step"] for line in metrics(run)] == [1, 3, 4]
    assert differing(weights(run, 2), weights(run, 1)) == [] and differing(weights(run, 3), weights(run, 2)) != []
    for done in (1, 2):
        again = as_at(run, done, tmp_path / f"after_{done}")
        train(config(root, again, **settings), SPOILT)
        assert lines(again) == lines(run) and state(again, 4) == state(run, 4)
        assert differing(final_state(again), final_state(run)) == []
    assert state(run, 4)["data"]["bad_steps"] == {"skipped": [{"step": 2, "first_sample": 8, "samples": 8}]}
    assert "bad_steps" not in state(run, 1)["data"]


def weights(run: Path, step: int) -> dict[str, Any]:
    """What a checkpoint of a step holds of weights and moments."""
    from megatron_prism.engine.sharded import Reader

    reader = Reader(run_folder.step_folder(run, step) / "sharded")
    return {key: reader.read(key) for key in sorted(reader.keys())}


def test_a_replay_sees_the_dropout_of_its_step_and_leaves_that_of_the_next_alone(root, tmp_path, monkeypatch):
    seen: list[Any] = []

    def watched(*args: Any, **options: Any) -> Any:
        seen.append(replay(*args, **options))
        return seen[-1]

    replay = recovery.forward_backward
    monkeypatch.setattr(recovery, "forward_backward", watched)
    settings = {"steps": 1, "hidden_dropout": 0.3, "bad_steps__on_nan": "skip"}
    run = train(config(root, tmp_path / "run", **settings), gradient(1, "mlp.linear_fc1", rank=0))
    record = json.loads((run / "bad_steps" / "step_00000001.json").read_text())
    total, tokens = seen[0].sum(dim=0).tolist()
    assert float(record["loss"]) == total / tokens
    monkeypatch.setattr(recovery.origin, "put_random_states", lambda states: None)
    other = train(config(root, tmp_path / "other", **settings), gradient(1, "mlp.linear_fc1", rank=0))
    total, tokens = seen[1].sum(dim=0).tolist()
    assert float(json.loads((other / "bad_steps" / "step_00000001.json").read_text())["loss"]) != total / tokens, "dropout was seen to matter"


def test_more_steps_of_nan_than_the_recipe_allows_stop_the_run(root, tmp_path):
    settings = {"steps": 6, "bad_steps__on_nan": "skip", "bad_steps__max_skipped": 2, "checkpoint__save_interval": 1}
    with pytest.raises(DivergenceError, match=r"step 3: .*linear_fc2.weight.*more than bad_steps.max_skipped=2 of 1000 steps"):
        train(config(root, tmp_path / "run", **settings), weight(2, "mlp.linear_fc2", rank=0))
    assert run_folder.newest(tmp_path / "run") == run_folder.step_folder(tmp_path / "run", 2)


def test_what_does_not_happen_again_is_said_to_be_so(root, tmp_path):
    calls: list[int] = []

    def once(run: Any) -> None:
        for parameter in run.engine.model[0].parameters():
            parameter.register_hook(lambda found: calls.append(1) or found * (torch.nan if len(calls) == 1 else 1.0))

    again = r"it did not happen again when the batch was replayed .* were finite\. That tells no cause: .*deterministic=true"
    with pytest.raises(PassingDivergenceError, match=again) as refusal:
        train(config(root, tmp_path / "run"), once)
    assert not isinstance(refusal.value, FaultyMachineError), "nothing of the machine was seen to be wrong"


# --- spikes --------------------------------------------------------------------------------------------------------------------------------------

SPIKE = {**PLANTED_SPIKE, "hidden_dropout": 0.05}
WINDOWS = [(56, 32), (88, 32)]


@pytest.fixture(scope="module")
def rolled_back(root: Path) -> Path:
    return train(config(root, root / "rolled_back", **SPIKE), POISON)


def test_a_run_that_went_back_ends_as_one_whose_plan_left_the_poisoned_windows_out_from_the_start(root, rolled_back, tmp_path):
    def follow(run: Any) -> None:
        records = recorded(run.data.fingerprint)
        for window in WINDOWS:
            records = without_window(records, *window)
        run.data.follow(records)

    unbroken = train(config(root, tmp_path / "unbroken", **{**SPIKE, "bad_steps__spike__max_rollbacks": 1}), POISON, follow)
    assert not (unbroken / "bad_steps").exists()
    assert lines(unbroken) == lines(rolled_back) and [line["step"] for line in metrics(rolled_back)] == list(range(1, 19))
    assert differing(final_state(rolled_back), final_state(unbroken)) == []
    seen = train(config(root, tmp_path / "poisoned", **{**SPIKE, "bad_steps__spike": None}), POISON)
    assert differing(final_state(seen), final_state(unbroken)) != []


def test_what_was_left_out_and_taken_back_is_told_in_every_place(rolled_back):
    progress = state(rolled_back, 18)
    plans = progress["data"]["history"]
    assert [(window["start"], window["samples"]) for window in plans[0]["skipped"]] == [(56, 32), (120, 32)]
    assert json.loads((rolled_back / artifact.PROVENANCE).read_text())["data_plans"] == plans
    assert progress["samples"] == 18 * BATCH == sum(taken["samples"] for taken in progress["consumed"].values())
    assert sum(taken.get("skipped", 0) for taken in progress["consumed"].values()) == 64
    records = [record for _, record in bad_steps.rollbacks(rolled_back)]
    assert [(record["step"], record["to_step"], record["rollback"]) for record in records] == [(10, 6, 1), (14, 10, 2)]
    jumped = [line["loss"] for line in records[0]["taken_back"] if "grad_norm" in line]
    assert len(jumped) == 4 and min(jumped[2:]) > 1.1 * max(jumped[:2])
    told = [json.loads(line) for line in (rolled_back / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["rolled_back_from"]) for line in told if "rollback" in line] == [(6, 10), (10, 14)]
    assert [line["step"] for line in told] == sorted(line["step"] for line in told)
    assert [folder.name for folder in run_folder.complete_steps(rolled_back)] == [f"step_{step:08d}" for step in range(2, 19, 2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment", ["before the old checkpoints are gone", "after it went back", "after the next checkpoint", "between its suspect steps"]
)
def test_a_run_that_is_killed_around_a_rollback_goes_on_to_the_same_end(root, rolled_back, tmp_path, monkeypatch, moment):
    def kill(*_: Any) -> None:
        raise KilledError

    run, step_of = tmp_path / "run", loop._step
    with monkeypatch.context() as patched:
        if moment == "before the old checkpoints are gone":
            patched.setattr(recovery.bad_steps, "finish_rollbacks", lambda folder: kill() if bad_steps.rollbacks(folder) else None)
        else:
            back, last = {"after it went back": (True, 8), "after the next checkpoint": (True, 9), "between its suspect steps": (False, 9)}[moment]
            patched.setattr(loop, "_step", lambda run: kill() if run.progress.step == last and (run.memory.rollbacks > 0) == back else step_of(run))
        with pytest.raises(KilledError):
            train(config(root, run, **SPIKE), POISON)
    decided = {path.name: path.read_bytes() for path, _ in bad_steps.rollbacks(run)}
    stage_run(config(root, run, **SPIKE))
    assert len(decided) == (moment != "between its suspect steps")
    assert all((run / "bad_steps" / name).read_bytes() == content for name, content in decided.items()), "it was not gone through twice"
    assert differing(final_state(run), final_state(rolled_back)) == [] and lines(run) == lines(rolled_back)
    assert state(run, 18) == state(rolled_back, 18)
    assert len(bad_steps.rollbacks(run)) == 2


class KilledError(Exception):
    """Stands for the end of the process."""


def stage_run(cfg: TrainConfig) -> None:
    """As `prism train` runs it, with what is known before torch."""
    from megatron_prism.engine import data_plan

    data_plan.check(cfg)
    train(cfg, POISON)


def test_one_jump_more_than_the_recipe_allows_stops_the_run_and_says_where_it_stands(root, rolled_back, tmp_path):
    again = as_at(rolled_back, 12, tmp_path / "again")
    settings = {**SPIKE, "bad_steps__spike__max_rollbacks": 1}
    shutil.rmtree(run_folder.step_folder(again, 12))
    (again / "bad_steps" / "step_00000014_rollback_2.json").unlink()
    for folder in run_folder.complete_steps(again):
        if int(folder.name.removeprefix("step_")) > 6:
            checkpoint.remove(folder)
    with pytest.raises(DivergenceError, match=r"step 14: loss .* in a row, from step 13 on, beyond .*The run went back 1 times"):
        train(config(root, again, **settings), POISON)


def test_a_jump_before_the_first_checkpoint_stops_the_run(root, tmp_path):
    settings = {**SPIKE, "checkpoint__save_interval": 12, "checkpoint__keep_last": None}
    with pytest.raises(DivergenceError, match=r"step 10: .*There is no checkpoint from before it"):
        train(config(root, tmp_path / "run", **settings), POISON)
