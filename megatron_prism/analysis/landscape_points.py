"""The merged models of a landscape, made one by one from three that are open: a tensor of each in memory at a time.

Owns: that no NaN is merged, that a merged model is on disk whole or not at all. Refuses: models with NaN or infinite weights, by tensor, before the
first point.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from megatron_prism.analysis.landscape import ModelName, Place
from megatron_prism.artifact import temporary_of
from megatron_prism.engine import merging
from megatron_prism.errors import UserError
from megatron_prism.families.components import COMPONENTS


class Models:
    """The models of a landscape, in the order base, mid-trained, after RL."""

    def __init__(self, folders: Mapping[ModelName, Path], like: ModelName) -> None:
        """like: whose config and tokenizer the points take. Errors: UserError naming a tensor that is missing, misshapen or unread."""
        self.folders = folders
        self.parents = {name: merging.open_parent(folder) for name, folder in folders.items()}
        self.like = self.parents[like]
        self.rules = list(self.like.family.rules(self.like.model))

    def check_finite(self, advance: Callable[[int], None]) -> None:
        """Read every weight once. advance: told of every rule. Errors: UserError naming model and tensor with NaN or infinite values."""
        for name, parent in self.parents.items():
            for entry in self.rules:
                for part, tensor in zip(entry.parts(parent.model), parent.tensors(entry), strict=True):
                    strange = int((~torch.isfinite(tensor)).sum())
                    if strange:
                        raise UserError(
                            f"model {name} ({self.folders[name]}): {part.name} holds {strange} values that are NaN or infinite; weights must be "
                            "finite to be merged: take an earlier checkpoint"
                        )
                advance(1)

    def write(self, place: Place, output: Path, dtype: str) -> None:
        """The model at a point as a Hugging Face folder; nothing where it is there already."""
        if output.is_dir():
            return
        weights = list(place.weights[: len(self.parents)])
        mixing = merging.Mixing("linear", dict.fromkeys(COMPONENTS, weights))
        temporary = temporary_of(output)
        temporary.mkdir(parents=True)
        merging.Merged(list(self.parents.values()), self.like, mixing, dtype, lambda _: None).to_hf(temporary)
        temporary.rename(output)


def remove(folder: Path) -> None:
    """Take a merged model off the disk; half of one is never seen."""
    if folder.is_dir():
        doomed = temporary_of(folder)
        folder.rename(doomed)
        shutil.rmtree(doomed)
