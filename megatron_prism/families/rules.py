"""Two-way weight rules: how the tensors of a Hugging Face model become megatron-core's, and, derived from the same lines, back again.

Owns: the vocabulary (`Copy`, `FuseQKV`, `FuseGateUp`, `CopyGateUp`, `Tied`, `Drop`), names and shapes on both sides, the dimension that tensor
parallelism cuts.
A rule with `{i}` in its Hugging Face name holds for every layer (of the kind `at`). megatron-core keeps such a tensor as one global tensor with a
leading layer axis, except in hybrid models: there each layer's tensor has the layer's number in its name.
Sizes are names of `ModelConfig` attributes (`mamba.d_inner` goes into its block), so a rule is data and needs no torch.
Refuses nothing itself: `engine.weights` checks names and shapes against what it finds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from megatron_prism.families.model_config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """One Hugging Face tensor of a rule: its name (`{i}` is the layer) and shape."""

    name: str
    shape: Shape


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One megatron-core tensor (of one layer), made of one or several Hugging Face tensors that are stacked along dimension 0.

    `parts` and `groups` say it all: the parts' rows alternate group by group (one group: they simply follow each other). `fuse` and `split` both
    read this one declaration, so neither can be changed alone.
    """

    hf: str
    """Hugging Face name, `{i}` for the layer"""
    key: str
    """megatron-core's global key"""
    tp_axis: int | None = None
    """dimension of the (one layer's) tensor that tensor parallelism cuts; None: every rank holds all of it"""
    padded: bool = False
    """dimension 0 is the vocabulary, which megatron-core may pad at its end"""
    when: str | None = None
    """ModelConfig attribute that must be true for the rule to hold; `not NAME` for one that must be false"""
    keep_fp32: bool = False
    """never rounded to a shorter type, whatever a conversion asks for, and fp32 in a bf16 run"""
    at: str | None = None
    """symbol of the layers that have the tensor (M Mamba-2, * attention, - MLP); None: every layer"""

    def parts(self, model: ModelConfig) -> tuple[Part, ...]:
        """The Hugging Face tensors, in the order in which they are stacked."""
        raise NotImplementedError

    def groups(self, model: ModelConfig) -> int:
        """Blocks in which the parts alternate."""
        return 1

    @property
    def layered(self) -> bool:
        """Whether the rule holds once for every layer."""
        return "{i}" in self.hf

    def holds(self, model: ModelConfig) -> bool:
        """Whether this model has the tensor."""
        return holds(self.when, model)

    def shape(self, model: ModelConfig) -> Shape:
        """megatron-core's shape of one layer's tensor, the vocabulary unpadded."""
        parts = self.parts(model)
        return (sum(part.shape[0] for part in parts), *parts[0].shape[1:])

    def sections(self, tensors: Sequence["Tensor"], model: ModelConfig) -> list["Tensor"]:
        """Hugging Face tensors -> the sections of megatron-core's tensor, to be stacked along dimension 0.

        Tensor parallelism cuts each section apart. Sections are the inputs themselves, uncopied, unless parts alternate.
        """
        groups = self.groups(model)
        if groups == 1:
            return list(tensors)
        import torch

        blocks = [tensor.reshape(groups, -1, *tensor.shape[1:]) for tensor in tensors]
        return [torch.cat(blocks, dim=1).flatten(0, 1)]

    def split(self, tensor: "Tensor", model: ModelConfig) -> list["Tensor"]:
        """megatron-core's tensor (one layer, vocabulary unpadded) -> Hugging Face tensors in the order of `parts`; the inverse of `sections`."""
        groups = self.groups(model)
        rows = [part.shape[0] // groups for part in self.parts(model)]
        blocks = tensor.reshape(groups, -1, *tensor.shape[1:]).split(rows, dim=1)
        return [block.flatten(0, 1) for block in blocks]


@dataclass(frozen=True, kw_only=True)
class Copy(Rule):
    """The same tensor on both sides."""

    sizes: tuple[str, ...]
    """ModelConfig attributes: the shape"""

    def parts(self, model: ModelConfig) -> tuple[Part, ...]:
        return (Part(self.hf, sizes(self.sizes, model)),)


@dataclass(frozen=True, kw_only=True)
class FuseQKV(Rule):
    """Query, key and value projections: for each query group its query heads, its key head, its value head. `{qkv}` in the name is q, k or v."""

    columns: tuple[str, ...] = ()
    """shape after dimension 0; empty for a bias"""
    tp_axis: int | None = 0

    def parts(self, model: ModelConfig) -> tuple[Part, ...]:
        columns = sizes(self.columns, model)
        rows = {"q": model.query_size, "k": model.kv_size, "v": model.kv_size}
        return tuple(Part(self.hf.replace("{qkv}", letter), (count, *columns)) for letter, count in rows.items())

    def groups(self, model: ModelConfig) -> int:
        return model.num_query_groups


@dataclass(frozen=True, kw_only=True)
class FuseGateUp(Rule):
    """Gate and up projections of a gated MLP, gate first; each is cut apart by tensor parallelism. `{gate_up}` in the name is gate or up."""

    columns: tuple[str, ...] = ()
    tp_axis: int | None = 0

    def parts(self, model: ModelConfig) -> tuple[Part, ...]:
        shape = (model.ffn_hidden_size, *sizes(self.columns, model))
        return tuple(Part(self.hf.replace("{gate_up}", word), shape) for word in ("gate", "up"))


@dataclass(frozen=True, kw_only=True)
class CopyGateUp(Rule):
    """Gate and up projections that Hugging Face keeps in one tensor too, gate first; each is cut apart by tensor parallelism."""

    columns: tuple[str, ...] = ()
    tp_axis: int | None = 0

    def parts(self, model: ModelConfig) -> tuple[Part, ...]:
        return (Part(self.hf, (2 * model.ffn_hidden_size, *sizes(self.columns, model))),)

    def sections(self, tensors: Sequence["Tensor"], model: ModelConfig) -> list["Tensor"]:
        return list(tensors[0].chunk(2))


@dataclass(frozen=True)
class Tied:
    """A Hugging Face tensor that some files store although it is another one's alias: it must be equal, and is not written back."""

    hf: str
    same_as: str
    when: str


@dataclass(frozen=True)
class Drop:
    """A Hugging Face tensor of old files that transformers recomputes: neither needed nor written back."""

    hf: str


def holds(when: str | None, model: ModelConfig) -> bool:
    """Whether a condition (`NAME` or `not NAME`, a ModelConfig attribute) is met."""
    if when is None:
        return True
    name = when.removeprefix("not ")
    return bool(_value(name, model)) == (name == when)


def sizes(names: Sequence[str], model: ModelConfig) -> Shape:
    """The values of size attributes."""
    return tuple(int(_value(name, model)) for name in names)


def _value(name: str, model: ModelConfig) -> Any:
    return attrgetter(name)(model)
