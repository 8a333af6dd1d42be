"""The quickstart's chain, whole, with fewer steps: what `make quickstart` runs must run, and run again as nothing to do."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prism.launch.plan import load_plan

ROOT = Path(__file__).resolve().parents[2]
CHANGES = {
    "base.toml": {"steps = 1000": "steps = 12", "warmup_steps = 30": "warmup_steps = 2"},
    "midtrain.toml": {"steps = 2000": "steps = 12", "decay_steps = 650": "decay_steps = 4", "warmup_steps = 30": "warmup_steps = 2"},
    "rl.toml": {"prompts_per_step = 32": "prompts_per_step = 2", "count = 3000": "count = 20", "warmup_steps = 10": "warmup_steps = 1"},
    "pipeline.toml": {"steps = 30": "steps = 2"},
    "evaluate.toml": {"[tasks]": "[tasks]\nnum_questions = 4", "12_000": "2_000"},
    "cka.toml": {"inputs = 100": "inputs = 8", "size = 50": "size = 4"},
}


def _prism(folder: Path, timeout: float) -> str:
    command = [sys.executable, "-m", "megatron_prism", "run", "examples/tiny/pipeline.toml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_every_recipe_of_the_examples_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for example in ("tiny", "smollm2_135m"):
        plan = load_plan(ROOT / "examples" / example / "pipeline.toml")
        assert plan[-1].name == {"tiny": "report", "smollm2_135m": "evaluate"}[example]
        assert {step.job.ranks for step in plan if step.parallel} == {2}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_chain_runs_from_nothing_and_is_skipped_when_done(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples" / "tiny", tmp_path / "examples" / "tiny")
    for name, changes in CHANGES.items():
        recipe = tmp_path / "examples" / "tiny" / name
        text = recipe.read_text()
        for before, after in changes.items():
            assert before in text
            text = text.replace(before, after)
        recipe.write_text(text)
    first = _prism(tmp_path, timeout=800)
    assert "11 run, 0 skipped" in first
    scores = json.loads((tmp_path / "runs" / "tiny" / "evaluate" / "scores.json").read_text())["models"]
    assert list(scores) == ["base", "midtrained", "rl"]
    for figures in scores.values():
        assert list(figures["perplexity"]["domains"]) == ["general", "code", "math"]
        assert list(figures["tasks"]) == ["chain_sum", "leg_counting"]
        assert 900_000 < figures["parameters"] < 1_300_000
    page = (tmp_path / "runs" / "tiny" / "report" / "report.html").read_text()
    sections = ["lineage", "data", "training", "rl", "evaluation", "weights", "cka", "behaviour", "provenance"]
    assert re.findall(r'<h2 id="([a-z]+)"', page) == sections
    assert "10 artifacts: 10 finished" in page, "all but the report itself"
    assert "cannot be" not in page
    held_out = [tmp_path / "runs" / "tiny" / data / "prose" / "validation" / "shard_00000.bin" for data in ("base_data", "midtrain_data")]
    assert held_out[0].read_bytes() == held_out[1].read_bytes()  # neither model has read what both are scored on
    assert "0 run, 11 skipped" in _prism(tmp_path, timeout=120)
