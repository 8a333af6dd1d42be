"""Several models of one shape become one: every weight a mean of theirs, tensor by tensor, out of checkpoints of any layout and Hugging Face folders.

Owns: opening the models, the arithmetic, the types of the result. What is written, and how, is `weights`.
Refuses: inputs that lack a tensor or have one of another shape (by name, before anything is written). That the models are one kind, with one
tokenizer and fitting weights, is the stage's to check.
Peak memory: one tensor of one input, its fp32 form and the fp32 mean (slerp: two inputs), and the pages of one mapped shard of each folder.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_prism import families
from megatron_prism.engine import hf, sharded
from megatron_prism.engine.weights import HF, SHARDED, MegatronNames, Source, check_names, export_dtypes, to_dtype, write_checkpoint, write_hf_folder
from megatron_prism.families.components import Component, component
from megatron_prism.families.family import Family, Layered
from megatron_prism.families.model_config import ModelConfig

Method = Literal["linear", "slerp"]
PARALLEL = 0.9995
"""cosine above which two tensors point one way: the arc is then as good as straight, and its formula divides by nearly nothing"""


@dataclass(frozen=True)
class Parent:
    """One model to merge, its tensors under Hugging Face names: one tensor a call, of any stored type."""

    hf_dir: Path
    """folder with config.json and tokenizer"""
    family: Family
    model: ModelConfig
    tensors: Callable[[Layered], list[Tensor]]
    """the tensors of a rule, in the order of its parts; of a checkpoint trained in bf16, the fp32 masters"""
    dtype: Callable[[Layered], torch.dtype]
    """the type that an export would give them"""


@dataclass(frozen=True)
class Mixing:
    """How much each model counts, in each part of it."""

    method: Method
    weights: dict[Component, list[float]]
    """for each part that the model has, one weight a model"""


def open_parent(folder: Path) -> Parent:
    """A checkpoint folder or a Hugging Face folder. Errors: UserError naming what is missing, truncated or misshapen."""
    if not (folder / SHARDED).is_dir():
        family, model = families.load(folder)
        reader = hf.Reader(folder)
        check_names(reader, family, model)
        return Parent(
            folder,
            family,
            model,
            lambda entry: [reader.tensor(part.name) for part in entry.parts(model)],
            lambda entry: reader.entries[entry.parts(model)[0].name].dtype,
        )
    family, model = families.load(folder / HF)
    names = MegatronNames(sharded.Reader(folder / SHARDED), family, model)
    original = export_dtypes(folder, None)
    return Parent(
        folder / HF,
        family,
        model,
        lambda entry: entry.rule.split(names.read(entry), model),
        lambda entry: original(entry.parts(model)[0].name, names.dtype(entry)),
    )


class Merged:
    """The model that the parents make, in the form of `like`: types, config and tokenizer are that one's."""

    def __init__(self, parents: Sequence[Parent], like: Parent, mixing: Mixing, dtype: str | None, advance: Callable[[int], None]) -> None:
        """dtype: of the result; None: the types of `like`. advance: told of every rule that is done."""
        self.parents, self.like, self.mixing, self.wanted, self.advance = parents, like, mixing, to_dtype(dtype), advance
        self.rules = list(like.family.rules(like.model))

    def to_checkpoint(self, output: Path, tp: int, pp: int) -> None:
        """Write `output`/hf and `output`/sharded, cut for any layout."""
        dtypes = {part.name: self.dtype(entry) for entry in self.rules for part in entry.parts(self.like.model)}
        source = Source(self.like.family, self.like.model, self.like.hf_dir, self._sections, dtypes)
        write_checkpoint(source, output, tp, pp)

    def to_hf(self, output: Path) -> None:
        """Write a Hugging Face folder."""
        plan = [hf.Planned(part.name, part.shape, self.dtype(entry)) for entry in self.rules for part in entry.parts(self.like.model)]
        write_hf_folder(self.like.hf_dir, output, plan, self._named(), self.wanted)

    def dtype(self, entry: Layered) -> torch.dtype:
        """Of the result: as asked for, else as in `like`; a mean of decay rates and step biases stays fp32."""
        return torch.float32 if entry.rule.keep_fp32 else self.wanted or self.like.dtype(entry)

    def tensors(self, entry: Layered) -> list[Tensor]:
        """A rule's tensors under their Hugging Face names, fp32."""
        weights = self.mixing.weights[component(entry.rule.key)]
        counting = [(parent, weight) for parent, weight in zip(self.parents, weights, strict=True) if weight]
        if len(counting) == 1:
            return [tensor.float() for tensor in counting[0][0].tensors(entry)]
        if self.mixing.method == "slerp":
            pairs = zip(*(parent.tensors(entry) for parent, _ in counting), strict=True)
            return [slerp(one, other, weights[1] / sum(weights)) for one, other in pairs]
        return average((parent.tensors(entry) for parent, _ in counting), [weight for _, weight in counting])

    def _sections(self, entry: Layered) -> list[Tensor]:
        """As `weights` writes them into a checkpoint."""
        kind = self.dtype(entry)
        sections = entry.rule.sections([tensor.to(kind) for tensor in self.tensors(entry)], self.like.model)
        self.advance(1)
        return sections

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for entry in self.rules:
            yield from zip((part.name for part in entry.parts(self.like.model)), self.tensors(entry), strict=True)
            self.advance(1)


def average(models: Iterable[Sequence[Tensor]], weights: Sequence[float]) -> list[Tensor]:
    """sum_i w_i x_i / sum_i w_i of each tensor, summed in fp32 in the order given. models: each one's tensors, asked for one model at a time."""
    means: list[Tensor] = []
    for tensors, weight in zip(models, weights, strict=True):
        if not means:
            means = [torch.zeros(tensor.shape, dtype=torch.float32) for tensor in tensors]
        for mean, tensor in zip(means, tensors, strict=True):
            mean.add_(tensor, alpha=weight)
    total = float(torch.tensor(weights, dtype=torch.float32).sum())
    return means if total == 1.0 else [mean.div_(total) for mean in means]


def slerp(one: Tensor, other: Tensor, share: float) -> Tensor:
    """The point at `share` of the arc from one tensor to the other, each as one vector (Shoemake 1985), fp32; of the line where they are parallel."""
    x, y = one.float(), other.float()
    lengths = x.norm().double() * y.norm().double()
    cosine = float(torch.dot(x.flatten(), y.flatten()).double() / lengths) if lengths else 1.0
    if abs(cosine) > PARALLEL:
        return x * (1.0 - share) + y * share
    angle = math.acos(cosine)
    return x * (math.sin((1.0 - share) * angle) / math.sin(angle)) + y * (math.sin(share * angle) / math.sin(angle))
