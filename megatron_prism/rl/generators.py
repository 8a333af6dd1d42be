"""The generator of a run: opened on the run's weights, woken and put to sleep around the trainer's turn, and given the trainer's weights.

Called on every rank, those without a generator too. Owns: whose turn the device's memory is, and that an error of one rank's generator is everyone's,
with no rank left in the collectives of the weights. Refuses: a tokenizer that cannot read back the marks that a reward or a tool looks for.
"""

import gc
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_prism.engine.ranks import on_all, on_main
from megatron_prism.engine.step import Engine
from megatron_prism.engine.weight_sync import weight_stream
from megatron_prism.engine.weights import export_hf
from megatron_prism.errors import UserError
from megatron_prism.evals.inline import apart
from megatron_prism.families.model_config import ModelConfig
from megatron_prism.generate import Generator, open_backend
from megatron_prism.generate.text import Speller
from megatron_prism.rl import rewards, tools
from megatron_prism.rl.recipe import RLConfig

GENERATOR = "generator"
"""folder of a run with the weights that its generator is opened on; gone when the run is finished"""


def open_generator(cfg: RLConfig, rank: int, newest: Path | None) -> Generator | None:
    """A generator on the weights that the run stands at; of vLLM's servers rank 0 is the one client. newest: the run's own checkpoint."""
    folder = cfg.output / GENERATOR
    start = newest or cfg.model.checkpoint
    assert start is not None

    def export() -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        return export_hf(start, folder, cfg.generation.dtype)

    on_main(export)
    if rank >= writers(cfg):
        return None
    with apart():
        return open_backend(folder, cfg.generation)


def writers(cfg: RLConfig) -> int:
    """How many ranks have a generator, the first so many."""
    return 1 if cfg.generation.backend == "vllm" else dist.get_world_size()


def sleeps(cfg: RLConfig) -> bool:
    """Whether the generators hand their memory over while the trainer works."""
    return cfg.can_sleep if cfg.generator_sleeps is None else cfg.generator_sleeps


def wake(cfg: RLConfig, generator: Generator | None) -> None:
    """The generators' turn. A server takes back the memory of every rank's device, so that all ranks let go of it before any generator wakes."""
    if not sleeps(cfg):
        return
    free_cached_memory()
    dist.barrier()
    if generator is not None:
        generator.wake()


def sleep(cfg: RLConfig, generator: Generator | None) -> None:
    """The trainer's turn."""
    if generator is not None and sleeps(cfg):
        generator.sleep()


def free_cached_memory() -> None:
    """Give the device what torch keeps of it for later: other processes cannot have it until then."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def update(cfg: RLConfig, generator: Generator | None, engine: Engine, model: ModelConfig, step: int) -> None:
    """Give the generators the trainer's weights, those of this step. Errors: any rank's, on every rank, once none waits for tensors any more."""

    def hand_over(_rank: int) -> None:
        stream = weight_stream(engine, model, getattr(torch, cfg.generation.dtype), ranks="first" if writers(cfg) == 1 else "all")
        try:
            if generator is not None:
                generator.update_weights(stream, version=step)
        finally:  # whatever was left of it, or all of it where the generator never began: the other ranks exchange it to its end
            for _ in stream:
                assert generator is not None, "a rank that writes nothing is sent nothing"

    on_all(hand_over)


def check_marks(cfg: RLConfig, tokenizer: Any) -> None:
    """Errors: UserError for a mark that is lost between tokens and the text that is graded: every reward would be 0, and nothing would say why."""
    speller = Speller(tokenizer, ())
    for mark, key in _marks(cfg).items():
        tokens = tokenizer(mark, add_special_tokens=False)["input_ids"]
        read = speller.decode((), tokens)
        if mark not in read:
            raise UserError(
                f"{key} looks for {mark} in what the model writes, and this tokenizer reads its tokens {list(tokens)} back as {read!r}: text leaves "
                f'special tokens out. Make {mark} an ordinary token ("special": false in added_tokens of tokenizer.json and in '
                "added_tokens_decoder of tokenizer_config.json, and in no list of special tokens) in model.checkpoint's tokenizer, "
                f"or set {'reward.format=off' if key == 'reward.format' else 'rollout.tool=none'}"
            )


def _marks(cfg: RLConfig) -> Mapping[str, str]:
    """The marks that are looked for, each with the recipe's key that asks for it."""
    marks = {"required": (rewards.THINK, rewards.END_OF_THOUGHT), "opened": (rewards.END_OF_THOUGHT,), "off": ()}[cfg.reward.format]
    found = dict.fromkeys(marks, "reward.format")
    return found if cfg.rollout.tool is None else found | dict.fromkeys((tools.OPEN, tools.CLOSE), "rollout.tool")
