"""Rank 0 chooses the checkpoint that an RL run goes on from, for all: another machine may list the folder as it was a minute ago."""

import json
from pathlib import Path

import pytest
import rl_runs
from multirank import run_ranks
from training import differing, final_state

from megatron_prism.engine import run_folder

SETTINGS = {
    "steps": 2,
    "samples__interval": 1,
    "checkpoint__save_interval": 1,
    "checkpoint__keep_last": None,
    "rollout__steps_ahead": 1,
    "prompts__prompts_per_step": 2,
    "rollout__responses_per_prompt": 2,
}


@pytest.mark.slow
def test_a_rank_that_sees_an_older_folder_goes_on_from_rank_0s_checkpoint(tmp_path: Path) -> None:
    rl_runs.make_inputs(tmp_path)
    outputs = {name: tmp_path / name for name in ("whole", "resumed")}
    (tmp_path / "cases.json").write_text(json.dumps({name: rl_runs.recipe(tmp_path, output, **SETTINGS) for name, output in outputs.items()}))
    run_ranks(Path(__file__).with_name("stale_ranks.py"), 2, str(tmp_path / "cases.json"), timeout=150)
    assert rl_runs.numbers(outputs["resumed"]) == rl_runs.numbers(outputs["whole"])
    assert rl_runs.samples(outputs["resumed"], 2) == rl_runs.samples(outputs["whole"], 2)
    assert differing(final_state(outputs["resumed"]), final_state(outputs["whole"])) == []
    assert not run_folder.step_folder(outputs["resumed"], 7).exists(), "what was half-written is gone"
