"""What is known of a run's data before torch is imported."""

import pytest
from tiny_blend import write_tiny_blend
from training import VOCAB_SIZE, from_random, recipe

from megatron_prism.config import load_recipe
from megatron_prism.engine import data_plan
from megatron_prism.engine.recipe import TrainConfig
from megatron_prism.errors import UserError


def test_limits_on_epochs_and_packing_are_refused_together(tmp_path):
    write_tiny_blend(tmp_path / "data", VOCAB_SIZE)
    blend = tmp_path / "data" / "blend.toml"
    blend.write_text(blend.read_text().replace("\nweight =", "\nmax_epochs = 100.0\nweight =", 1))
    settings = recipe(tmp_path, tmp_path / "run", **from_random(tmp_path))
    assert data_plan.check(load_recipe(None, settings, TrainConfig)).rows[0].max_epochs == 100.0
    with pytest.raises(UserError, match="the limit would not hold"):
        data_plan.check(load_recipe(None, [*settings, "data.packing.pad_multiple=16"], TrainConfig))
