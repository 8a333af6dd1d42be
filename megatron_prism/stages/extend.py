"""Extend: a checkpoint is trained on longer sequences, with what these need changed: its largest length, rotary embeddings, sliding window.

The recipe is that of `prism train` with [rope], and the defaults of PRISM's 128k stage (arXiv 2603.17074, Table 17): 1,000 steps at 131,072 tokens,
exponential decay to 0 after 100 steps of warm-up, rotary embeddings unchanged. The training is `prism train`'s own, and goes on like it.
"""

from dataclasses import replace
from typing import ClassVar, Literal

from megatron_prism import families
from megatron_prism.config import Fraction, NonNegative, Positive
from megatron_prism.differences import differences
from megatron_prism.engine import recipe
from megatron_prism.engine.recipe import TrainConfig, parents
from megatron_prism.engine.recipe_blocks import DataSection
from megatron_prism.engine.schedule import ScheduleConfig
from megatron_prism.families.extension import Extension, RopeChange
from megatron_prism.families.model_config import ModelConfig
from megatron_prism.stages import train
from megatron_prism.stages.train import run

__all__ = ["Config", "dry_run", "parents", "run"]


class LongData(DataSection):
    """What to read, in long sequences."""

    seq_len: Positive = 131_072
    """tokens per sequence"""


class ShortSchedule(ScheduleConfig):
    """How the learning rate moves over the extension."""

    kind: Literal["constant", "linear", "cosine", "exponential", "wsd"] = "exponential"
    """shape of the decay after warm-up"""
    warmup_steps: NonNegative = 100
    """steps of linear warm-up from 0"""
    final_lr_fraction: Fraction = 0.0
    """fraction of the peak at the end of the decay, and after it"""


class Config(TrainConfig):
    """An extension to longer sequences."""

    stage: ClassVar[str] = "extend"

    data: LongData
    steps: Positive = 1000
    """optimizer steps in all"""
    schedule: ShortSchedule = ShortSchedule()
    rope: RopeChange = RopeChange()
    max_position_embeddings: Positive | None = None
    """the largest length that the exported config.json names; none: data.seq_len, or the checkpoint's where that is larger"""
    sliding_window: Literal["keep", "remove"] | None = None
    """of a model that has one (Mistral-7B): keep it, or let every token see all before it; such a model must say which"""

    def extension(self, model: ModelConfig) -> Extension:
        """What becomes of the lengths that the start was made for."""
        return Extension(self.data.seq_len, self.max_position_embeddings, self.rope, self.sliding_window)


def planned(model: ModelConfig, cfg: Config) -> ModelConfig:
    """A model after its extension, as far as costs depend on it: what a plan takes where there is no checkpoint yet."""
    window = None if cfg.sliding_window == "remove" else model.sliding_window
    return replace(model, sliding_window=window, max_position_embeddings=max(model.max_position_embeddings, cfg.data.seq_len))


def dry_run(cfg: Config) -> None:
    """Print what changes in config.json, then what `prism train` would print."""
    recipe.check_start(cfg)
    before = families.read_config(recipe.model_files(cfg))
    changed = differences(before, recipe.trained_config(cfg)[0])
    print("config.json  " + ("; ".join(changed) if changed else "stays as it is: the checkpoint's own lengths and rotary embeddings"))
    train.dry_run(cfg)
