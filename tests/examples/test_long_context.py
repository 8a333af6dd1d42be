"""The recipes of merging and extension: the paper's figures, and layouts that fit."""

from pathlib import Path

import pytest

from megatron_prism.config import load_recipe
from megatron_prism.planning import cost
from megatron_prism.stages import extend, merge
from megatron_prism.stages.plan import plan_recipe

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MERGES = sorted(EXAMPLES.glob("*/merge.toml"))
EXTENSIONS = [("granite_3_3_8b", "granite-3.3-8b-base"), ("mistral_7b", "mistral-7b-v0.1")]


@pytest.mark.parametrize("path", MERGES, ids=lambda path: path.parent.name)
def test_merges_take_0_15_of_the_base(path):
    """PRISM, section 8.1."""
    models = load_recipe(path, [], merge.Config).models
    assert [(model.path.name, model.weight) for model in models] == [("base", 0.15), ("midtrain", 0.85)]


@pytest.mark.parametrize(("folder", "model"), EXTENSIONS)
def test_extensions_are_the_papers_and_fit_32_gpus_of_80_gb(folder, model):
    """PRISM, Table 17: 1,000 steps, AdamW at 5e-5, exponential to 0, warm-up 100, cp 4, gradient checkpointing, 128k."""
    cfg, shape, plan = plan_recipe(EXAMPLES / folder / "extend.toml", [], model, gpus=32)
    assert isinstance(cfg, extend.Config)
    assert (cfg.steps, cfg.data.seq_len, plan.cp, cfg.recompute, cfg.micro_batch, cfg.precision) == (1000, 131_072, 4, "full", 1, "bf16")
    optimizer, schedule = cfg.optimizer, cfg.schedule
    assert (optimizer.lr, optimizer.betas, optimizer.eps, optimizer.weight_decay) == (5e-5, (0.9, 0.95), 1e-10, 0.1)
    assert (schedule.kind, schedule.warmup_steps, schedule.decay_steps, schedule.final_lr_fraction) == ("exponential", 100, None, 0.0)
    assert shape.sliding_window is None
    assert cost.memory(shape, plan, cfg.data.seq_len, cfg.training).fits(80)


def test_the_paper_s_model_keeps_its_rotary_embeddings():
    assert load_recipe(EXAMPLES / "granite_3_3_8b" / "extend.toml", [], extend.Config).rope.kind == "unchanged"


def test_the_tiny_extension_is_twice_as_long():
    cfg = load_recipe(EXAMPLES / "tiny" / "extend.toml", [], extend.Config)
    assert (cfg.data.seq_len, cfg.rope.kind, cfg.trainable, cfg.schedule.kind) == (1024, "yarn", "attention", "exponential")
