"""Which weights of a model are trained. The others are frozen: no gradient is made for them, DDP gives them no room for one, and the optimizer, which
would hold masters and moments and would decay them, does not know them. Stored they are as loaded, rounded to the run's type.
"""

from collections.abc import Sequence

from torch import nn

from megatron_prism.families.components import Trainable, component


def freeze(chunks: Sequence[nn.Module], trainable: Trainable) -> None:
    """Leave only the weights that are to be trained with a gradient. Called on every rank between building and wrapping its chunks."""
    for chunk in chunks:
        for name, weight in chunk.named_parameters():
            weight.requires_grad_(trainable == "all" or component(name) == trainable)
