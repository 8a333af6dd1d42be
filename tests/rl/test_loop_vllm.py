"""The RL loop with vLLM's servers (fake_vllm.py here, so that this takes seconds): syncs, a server that dies in a step, a mismatch."""

from pathlib import Path

import pytest
import rl_runs
from fake_vllm import stand_in

from megatron_prism import artifact
from megatron_prism.engine import parallel, run_folder
from megatron_prism.errors import MachineError, UserError
from megatron_prism.generate.vllm_server import PYTHON
from megatron_prism.rl import loop

SETTINGS = {
    "generation__backend": "vllm",
    "generation__batch_size": 4,
    "alarms__mismatch": None,
    "checkpoint__save_interval": 1,
    "checkpoint__keep_last": None,
    "samples__interval": 1,
    "steps": 3,
}
"""The fake's log-probabilities are no model's: only the mismatch can tell, and its limit is off."""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(PYTHON, str(stand_in(tmp_path)))
    monkeypatch.setenv("FAKE_COUNTER", str(tmp_path / "count"))
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls"))
    return rl_runs.make_inputs(tmp_path)


@pytest.fixture(autouse=True, scope="module")
def leave_groups():
    yield
    parallel.stop()


def test_a_server_that_dies_in_a_step_comes_back_with_the_weights_of_the_step(root, monkeypatch):
    monkeypatch.setenv("FAKE_DIES_AT", "25")
    run = loop.reinforce(rl_runs.config(root, root / "run", **SETTINGS))
    assert artifact.is_complete(run)
    for step in (1, 2, 3):
        kept = rl_runs.samples(run, step)
        assert len(kept) == 16 and {one["weights_version"] for one in kept} == {step - 1}
    assert (root / "calls").read_text().count("/collective_rpc") >= 3, "a sync a step"


def test_a_server_that_dies_once_in_each_step_does_not_end_the_run(root, monkeypatch):
    """Three losses in all, where one in a row is allowed."""
    monkeypatch.setenv("FAKE_DIES_AT", "5,30,47")
    run = loop.reinforce(rl_runs.config(root, root / "run", generation__max_restarts=1, **SETTINGS))
    assert artifact.is_complete(run) and len(rl_runs.samples(run, 3)) == 16


def test_a_server_that_keeps_dying_ends_the_run_as_a_machine_does_and_names_the_checkpoint(root, monkeypatch):
    monkeypatch.setenv("FAKE_DIES_AT", ",".join(map(str, range(25, 60))))
    with pytest.raises(MachineError, match="step 2: ") as raised:
        loop.reinforce(rl_runs.config(root, root / "run", generation__max_restarts=1, **SETTINGS))
    assert str(run_folder.step_folder(root / "run", 1)) in str(raised.value)
    assert [folder.name for folder in run_folder.complete_steps(root / "run")] == ["step_00000001"]


def test_a_mismatch_of_the_servers_is_seen_at_the_first_step(root):
    with pytest.raises(UserError, match=r"step 1: alarms.mismatch=0.3: trainer and generator differ by"):
        loop.reinforce(rl_runs.config(root, root / "run", **{**SETTINGS, "alarms__mismatch": 0.3}))
