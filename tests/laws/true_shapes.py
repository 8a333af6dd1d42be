"""Started by test_true_shapes: builds a published model's share of some tensor-parallel ranks on the meta device, and compares it with the rules.

    true_shapes.py NAME:TP,TP,... ...

No other rank exists: torch's fake process group stands for them, since nothing is computed.
"""

import functools
import itertools
import sys
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_prism import families
from megatron_prism.config import ParallelConfig
from megatron_prism.engine import device, parallel
from megatron_prism.engine.model import BuildOptions, build
from megatron_prism.planning.layout import make_plan


def main() -> None:
    """Check the first and the last rank of each tensor-parallel size."""
    device.setup("cpu")
    parallel.parallel_state.initialize_model_parallel = functools.partial(parallel_state.initialize_model_parallel, create_gloo_process_groups=False)
    for word in sys.argv[1:]:
        name, _, sizes = word.partition(":")
        for tp in map(int, sizes.split(",")):
            for rank in sorted({0, tp - 1}):
                check(name, tp, rank)
                print(f"{name}: tp={tp}, rank {rank} holds what the rules say")


def check(name: str, tp: int, rank: int) -> None:
    """Keys and global shapes of one rank's model against the rules'; every tensor that tp cuts is cut."""
    config = families.published(name)
    family = families.find(config)
    model = family.model_config(config)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=tp)
    plan = make_plan(model, ParallelConfig(tp=tp), tp, 128, global_batch=1, micro_batch=1)
    with torch.device("meta"):
        (chunk,) = build(model, parallel.build_mesh(plan, seed=1), BuildOptions(layers="local"), torch.device("meta"))
    expected: dict[str, tuple[int, ...]] = {}
    for entry in family.rules(model):
        shape = entry.rule.shape(model)
        if entry.rule.padded:
            shape = (plan.padded_vocab_size, *shape[1:])
        if entry.layer is not None and not model.is_hybrid:
            shape = (model.num_layers, *shape)
        expected[entry.key(model)] = shape
    found = {piece.key: piece.global_shape for piece in pieces(chunk.sharded_state_dict())}
    assert found == expected, {key: (found.get(key), expected.get(key)) for key in found.keys() ^ expected.keys() or expected}
    held = sum(weight.numel() for weight in chunk.parameters())
    whole = family.num_parameters(model)
    assert whole / tp <= held < whole / tp * 1.05 + 1e6, (held, whole)
    parallel.stop()


def pieces(state: dict[str, Any]) -> list[ShardedTensor]:
    """Every sharded tensor of a state dict, those that a factory makes too."""
    items = [item for item in nested_values(state) if not isinstance(item, ShardedObject)]
    built = [nested_values(item.build()) if isinstance(item, ShardedTensorFactory) else [item] for item in items]
    return list(itertools.chain.from_iterable(built))


if __name__ == "__main__":
    main()
