"""`prism evaluate` on long-context tasks: lengths in the model's own tokens, scores by length on the page, lengths beyond its positions refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_tiny

from megatron_prism.config import validate
from megatron_prism.errors import UserError
from megatron_prism.generate import continuous
from megatron_prism.stages import evaluate

LENGTHS = (1024, 2048)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("model") / "hf", max_position_embeddings=2048, rope_scaling=None)


def asked(output: Path, model: Path, lengths: tuple[int, ...]) -> evaluate.Config:
    tasks = {
        "names": [f"{name}-{length}" for name in ("niah_multiquery", "ruler_vt") for length in lengths],
        "num_questions": 1,
        "grading_workers": 0,
    }
    config = {"output": output, "device": "cpu", "models": [{"name": "tiny", "path": model}], "tasks": tasks, "generation": {"max_new_tokens": 3}}
    return validate(config, evaluate.Config, "test")


def test_scores_by_length_stand_on_the_page_and_prompts_fill_their_lengths(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    known = continuous.Decoder._read

    def watched(self: continuous.Decoder, requests: list[Any]) -> continuous.Batch:
        read.extend(len(fitted.prompt) for fitted in requests)
        return known(self, requests)

    monkeypatch.setattr(continuous.Decoder, "_read", watched)
    evaluate.run(asked(tmp_path / "out", model, LENGTHS))
    assert all(0.95 * length < tokens + 3 <= length for tokens, length in zip(read, LENGTHS * 2, strict=True)), read
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["models"]["tiny"]["tasks"]
    assert list(scores) == ["niah_multiquery-1024", "niah_multiquery-2048", "ruler_vt-1024", "ruler_vt-2048"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h2>By length</h2>" in page and "<polyline" in page and "mean of 2 tasks" in page
    assert "lines of noise with 1 chain of 5 variables" in page, "the hay, by its name"


def test_a_length_beyond_the_models_positions_is_refused_before_anything_is_written(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1 of 1 prompts leave no room: the longest has 40\d\d tokens.* pass the model's limit of 2048 tokens"):
        evaluate.run(asked(tmp_path / "out", model, (4096,)))
