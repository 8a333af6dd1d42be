"""The long-context demonstration in a tiny form: one command from a model to a picture, and again without doing anything twice."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
SHORT, LONG = 256, 1024


def demonstrate(work: Path, model: Path) -> str:
    sizes = ["--seq-len", LONG, "--steps", 2, "--documents", 2, "--questions", 1, "--characters", 40_000]
    command = [sys.executable, ROOT / "examples" / "smollm2_135m" / "extend.py", "--work", work, "--model", model, *sizes]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=240, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA of 256 positions that reads bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "<s>": 1, "</s>": 2, **{letter: place for place, letter in enumerate(letters, start=3)}}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    folder = write_tiny("llama", tmp_path_factory.mktemp("model") / "hf", vocab_size=len(letters) + 3, rope_scaling=None)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_command_goes_from_a_model_to_the_picture(model: Path, tmp_path: Path) -> None:
    shown = demonstrate(tmp_path / "work", model)
    work = tmp_path / "work"
    summary: dict[str, Any] = json.loads((work / "summary.json").read_text())
    extended, before = (json.loads((work / folder / "config.json").read_text()) for folder in ("extend/hf", "before_long"))
    assert extended["max_position_embeddings"] == before["max_position_embeddings"] == LONG
    head = 64 // 4
    assert extended["rope_theta"] == pytest.approx(before["rope_theta"] * (LONG / SHORT) ** (head / (head - 2)))
    curves = summary["loss"]
    assert list(curves) == ["before", "base-changed", "extended"] and all(len(curve["loss"]) == 16 for curve in curves.values())
    assert curves["before"]["loss"] != curves["base-changed"]["loss"] != curves["extended"]["loss"]
    assert sum(curves["extended"]["loss"]) < sum(curves["before"]["loss"]), "two steps from random weights"
    assert list(summary["needles"]["extended"]) == ["niah_single_1-1024", "niah_single_2-1024"]
    assert (work / "positions" / "positions.svg").read_text().count("<polyline") == 3
    assert "960-1,024" in shown and "needles found, %" in shown
    done = [work / part for part in ("import/COMPLETE", "data/COMPLETE", "positions/positions.json", "needles/scores.json")]
    stamps, losses = [file.stat().st_mtime_ns for file in done], (work / "extend" / "metrics.jsonl").read_text()
    demonstrate(work, model)
    assert [file.stat().st_mtime_ns for file in done] == stamps, "done stages are skipped"
    assert (work / "extend" / "metrics.jsonl").read_text() == losses


def test_documents_are_files_of_one_package_and_as_long_as_asked_for() -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("long_text", ROOT / "examples" / "smollm2_135m" / "long_text.py")
    assert spec is not None and spec.loader is not None
    long_text = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(long_text)
    held_out = list(long_text.standard_library(20_000, 100_000))
    assert 3 <= len(held_out) <= 5 and all(len(text) >= 20_000 for text in held_out)
    assert held_out == list(long_text.standard_library(20_000, 100_000))
    assert held_out[0].startswith("# __future__.py\n")
    training = list(long_text.packages(20_000, 40_000, 300_000))
    owners = [text.partition("\n")[0].removeprefix("# ").partition("/")[0] for text in training]
    assert len(set(owners)) > 5 and sum(map(len, training)) >= 300_000
    assert not any("# __future__.py\n" in text for text in training)
