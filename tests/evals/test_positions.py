"""Loss by position: the losses of one forward pass, bucket by bucket; only documents that are long enough; a picture of what was measured."""

import json
import math
import re
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from tiny_blend import write_source
from tiny_models import write_tiny

from megatron_prism import artifact
from megatron_prism.config import validate
from megatron_prism.data_prep.blend import Blend, BlendSource, write_blend
from megatron_prism.errors import UserError
from megatron_prism.evals import chart, positions
from megatron_prism.generate import chunks
from megatron_prism.generate.transformers_backend import TransformersGenerator

VOCABULARY = 97
LENGTHS = (10, 41, 60, 33, 40, 90)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of LENGTHS tokens, the end of document not counted."""
    root = tmp_path_factory.mktemp("blend")
    rng = np.random.default_rng(3)
    written = [rng.integers(3, VOCABULARY, length).tolist() for length in LENGTHS]
    for split in ("train", "validation"):
        write_source(root, "long", split, written, VOCABULARY)
    return write_blend(root / "blend.toml", Blend(0, (BlendSource("long", "code", 1.0, root / "long" / "train", root / "long" / "validation"),)))


def config(tmp_path: Path, model: Path, blend: Path, **changes: Any) -> positions.Config:
    asked = {"output": tmp_path / "out", "models": [{"name": "one", "path": model}], "blend": blend, "length": 40, "buckets": 4, "device": "cpu"}
    return validate({**asked, **changes}, positions.Config, "test")


def test_the_curve_is_the_mean_of_the_losses_of_one_forward_pass(tmp_path: Path, model: Path, blend: Path) -> None:
    cfg = config(tmp_path, model, blend)
    with mock.patch.object(chunks, "CHUNK_TOKENS", 7):
        positions.run(cfg)
    artifact.require(cfg.output, "positions")
    found = json.loads((cfg.output / "positions.json").read_text())["one"]
    texts = positions.documents(cfg)
    assert [len(text) for text in texts] == [41] * 4, "of 41, 60, 90 tokens, and of 40 with its end"
    network = TransformersGenerator.load(model).model
    rows = []
    for text in texts:
        with torch.inference_mode():
            table = network(torch.tensor(text)[None, :-1]).logits[0].log_softmax(-1)
        rows.append([-table[place, token].item() for place, token in enumerate(text[1:])])
    expected = np.array(rows).reshape(4, 4, 10).mean(axis=2)
    np.testing.assert_allclose(found["loss"], expected.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(found["error"], expected.std(axis=0, ddof=1) / 2, atol=1e-5)
    assert found["ends"] == [10, 20, 30, 40] and found["num_documents"] == 4


def test_the_picture_has_a_line_a_model_and_a_finished_output_is_left_alone(
    tmp_path: Path, model: Path, blend: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [{"name": "one", "path": model}, {"name": "<two>", "path": model}]
    with pytest.raises(UserError, match="models"):
        config(tmp_path, model, blend, models=models)
    cfg = config(tmp_path, model, blend, models=[models[0], {**models[1], "name": "two"}])
    positions.run(cfg)
    assert f"measured one, two: {cfg.output / 'positions.svg'}" in capsys.readouterr().out
    svg = (cfg.output / "positions.svg").read_text()
    assert svg.startswith("<svg ") and svg.count("<polyline") == 2 and svg.count("<circle") == 8 and ">two<" in svg
    stamp = (cfg.output / "positions.json").stat().st_mtime_ns
    positions.run(cfg)
    assert (cfg.output / "positions.json").stat().st_mtime_ns == stamp


def test_fewer_documents_are_spread_over_those_that_are_long_enough(tmp_path: Path, model: Path, blend: Path) -> None:
    every = positions.documents(config(tmp_path, model, blend, num_documents=None))
    two = positions.documents(config(tmp_path, model, blend, num_documents=2, split="train"))
    assert [text.tolist() for text in two] == [every[0].tolist(), every[-1].tolist()]


def test_what_cannot_be_measured_is_refused(tmp_path: Path, model: Path, blend: Path) -> None:
    with pytest.raises(UserError, match=r"no document of .* has more than length=91 tokens, the longest has 91: set length below that"):
        positions.run(config(tmp_path, model, blend, length=91))
    with pytest.raises(UserError, match="buckets=41 must be at most length=40"):
        positions.run(config(tmp_path, model, blend, buckets=41))
    other = write_tiny("llama", tmp_path / "small", vocab_size=50)
    with pytest.raises(UserError, match=r"the text has token \d+, the model 50 tokens"):
        positions.run(config(tmp_path, other, blend))


def test_a_chart_places_its_points_by_value() -> None:
    points = {"a": [chart.Point(4096, 0.0), chart.Point(8192, 0.5), chart.Point(16384, 1.0)], "b & c": [chart.Point(8192, 1.0, 0.1)]}
    svg = chart.lines(points, chart.Axes("length", "score", [(4096, "4k")], (0.0, 1.0), log_x=True))
    dots = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)]
    assert dots[1][0] - dots[0][0] == pytest.approx(dots[2][0] - dots[1][0], abs=0.2), "a doubling is as wide as the next"
    assert dots[0][1] > dots[1][1] > dots[2][1] == dots[3][1]
    assert math.isclose(dots[0][1] - dots[1][1], dots[1][1] - dots[2][1], abs_tol=0.2)
    assert "b &amp; c" in svg
    assert all(chart.LEFT <= x <= chart.WIDTH - chart.RIGHT and chart.TOP <= y <= chart.HEIGHT - chart.BOTTOM for x, y in dots)
    [tick] = re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="middle"[^>]*>4k<', svg)
    assert float(tick) == pytest.approx(dots[0][0], abs=0.2)
    wide = chart.lines(points, chart.Axes("length", "score", [(16384, "16k"), (32768, "32k")], log_x=True))
    [tick] = re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="middle"[^>]*>32k<', wide)
    assert float(tick) == pytest.approx(chart.WIDTH - chart.RIGHT), "ticks lie on the picture"
