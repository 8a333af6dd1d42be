"""A SIGTERM that one rank hears, whichever it is, stops all of them after the step that is under way."""

import json
from pathlib import Path

import pytest
import rl_runs
from multirank import run_ranks
from training import from_random, recipe

from megatron_prism import artifact
from megatron_prism.engine import run_folder


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_sigterm_to_the_second_rank_stops_training_and_rl_after_their_step(tmp_path: Path) -> None:
    rl_runs.make_inputs(tmp_path / "inputs")
    outputs = {kind: tmp_path / kind for kind in ("train", "rl")}
    cases = {
        "train": recipe(tmp_path, outputs["train"], **from_random(tmp_path), steps=5),
        "rl": rl_runs.recipe(tmp_path / "inputs", outputs["rl"], steps=5),
    }
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    run_ranks(Path(__file__).with_name("stopped_ranks.py"), 2, str(tmp_path / "cases.json"))
    for kind, output in outputs.items():
        assert run_folder.newest(output) == run_folder.step_folder(output, 2), kind
        assert not artifact.is_complete(output), kind
