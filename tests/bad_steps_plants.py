"""Defects that tests plant into a run that is built, and that turn numbers into NaN where they say: real weights, activations and gradients."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_prism.data_prep.history import History, Segment
from megatron_prism.engine import loop
from megatron_prism.engine.model import unwrap

SAMPLE = 13
"""of the second global batch of 8"""
Plant = Callable[[Any], None]
"""given the run on each rank"""


def layer_of(run: Any, number: int) -> Any:
    """A layer by its number in the whole model, from 0; None on ranks that do not hold it."""
    layers = [layer for chunk in run.engine.model for layer in unwrap(chunk).decoder.layers]
    return next((layer for layer in layers if layer.layer_number == number + 1), None)


def module_of(run: Any, number: int, name: str) -> Any:
    """A module of that layer, or None."""
    layer = layer_of(run, number)
    return layer.get_submodule(name) if layer is not None else None


def weight(number: int, name: str, rank: int, value: float = torch.nan) -> Plant:
    """One number of a weight, on one rank."""

    def plant(run: Any) -> None:
        module = module_of(run, number, name)
        if module is not None and run.engine.mesh.rank == rank:
            module.weight.data.view(-1)[5] = value

    return plant


def activation(number: int, name: str, rank: int, sample: int | None = None, value: float = torch.nan) -> Plant:
    """One number of what a module gives, on one rank; sample: only where it works on this sample of the run's stream."""

    def plant(run: Any) -> None:
        module = module_of(run, number, name)
        if module is None or run.engine.mesh.rank != rank:
            return
        seen: list[bool] = []
        wanted = None if sample is None else torch.from_numpy(run.data.tokens(sample)[0][:-1])
        for chunk in run.engine.model:
            unwrap(chunk).register_forward_pre_hook(lambda _, args: seen.append(wanted is None or bool((args[0] == wanted).all(dim=1).any())))

        def spoil(_: Any, args: Any, output: Any) -> Any:
            if not seen[-1]:
                return None
            first, *rest = output if isinstance(output, tuple) else (output,)
            mask = torch.ones_like(first)
            mask.view(-1)[7] = value
            return (first * mask, *rest) if isinstance(output, tuple) else first * mask

        module.register_forward_hook(spoil)

    return plant


def gradient(number: int, name: str, rank: int) -> Plant:
    """The gradient of a weight, on one rank."""

    def plant(run: Any) -> None:
        module = module_of(run, number, name)
        if module is not None and run.engine.mesh.rank == rank:
            module.weight.register_hook(lambda found: found * torch.nan)

    return plant


def gradient_of_output(number: int, name: str, rank: int) -> Plant:
    """The gradient of what a module gives, on one rank."""

    def spoil(_: Any, args: Any, output: Any) -> None:
        first: Tensor = output[0] if isinstance(output, tuple) else output
        if first.requires_grad:
            first.register_hook(lambda found: found * torch.nan)

    def plant(run: Any) -> None:
        module = module_of(run, number, name)
        if module is not None and run.engine.mesh.rank == rank:
            module.register_forward_hook(spoil)

    return plant


class Planted:
    """Inside, every run is built with these defects."""

    def __init__(self, *plants: Plant) -> None:
        self.plants, self.build = plants, loop.build_run

    def __enter__(self) -> None:
        def build(cfg: Any) -> Any:
            run = self.build(cfg)
            for plant in self.plants:
                plant(run)
            return run

        loop.build_run = build

    def __exit__(self, *error: Any) -> None:
        loop.build_run = self.build


def poison(*windows: range) -> Plant:
    """Tokens drawn at random in place of what the blend, with nothing left out, gives at these places: whenever and wherever that is read."""

    def plant(run: Any) -> None:
        reader = run.data
        alone = History([Segment(0, {name: source["weight"] for name, source in zip(reader.names, reader.fingerprint["sources"], strict=True)})])
        spoilt = set()
        for window in windows:
            sources, ordinals = alone.schedule(window.start, window.stop)
            spoilt |= {(reader.names[source], int(ordinal)) for source, ordinal in zip(sources, ordinals, strict=True)}
        read = reader._read_into

        def read_into(row: Any, counts: Any, index: int) -> int:
            place: int = read(row, counts, index)
            with reader._sampling:
                ordinal = reader.sampler.turn(index)[1]
            if (reader.names[place], ordinal) in spoilt:
                row[:] = np.random.default_rng(ordinal).integers(1, 90, len(row))
            return place

        reader._read_into = read_into

    return plant


SPIKE: dict[str, Any] = {
    "steps": 18,
    "checkpoint__save_interval": 2,
    "checkpoint__keep_last": None,
    "schedule__kind": "constant",
    "bad_steps__spike__window": 4,
    "bad_steps__spike__deviations": None,
    "bad_steps__spike__ratio": 1.1,
    "bad_steps__spike__max_rollbacks": 2,
}
SPIKE_SET = [f"{key.replace('__', '.')}={'none' if value is None else value}" for key, value in SPIKE.items()]
POISON = poison(range(64, 80), range(128, 144))
"""Steps 9 and 10 jump: back to step 6, and 8 to 11 are left out, 32 samples. Then 13 and 14: back to step 10, and 12 to 15 are left out."""
