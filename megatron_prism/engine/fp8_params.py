"""The layers' linear weights kept in FP8 alone (`fp8.params`): TransformerEngine's FP8 tensors in the model, gathered so, and fp32 masters.

Owns: the masters of the ranges that this rank updates, and FP8 from masters. A weight's scale is that of its largest value, rounded to bf16, on
whichever rank that lies (current scaling): one exchange for all weights. Data and scale are those that TransformerEngine's quantizer makes of the
whole weight in bf16, bit for bit, so that a run computes as one that keeps bf16 weights and casts them.
megatron-core with TransformerEngine takes 120 ms more for 8 layers of LLaMA-3.1-8B: it casts a range as one row, and transposes that row too.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import is_float8tensor, post_all_gather_processing
from megatron.core.tensor_parallel import copy_tensor_model_parallel_attributes
from torch import Tensor

from megatron_prism.kernels.fp8_cast import fp8_cast, largest, scales_of


def is_fp8(weight: Any) -> bool:
    """Whether the model keeps this weight in FP8 alone."""
    return bool(is_float8tensor(weight))


def stored(weight: Any) -> Tensor:
    """What a weight is in memory: of an FP8 one, its bytes."""
    data: Tensor = weight._data if is_fp8(weight) else weight
    return data


def make_transposes(weights: Iterable[Any]) -> None:
    """FP8 products of the backward pass read the transpose: made anew, in its place, after a weight's bytes were gathered."""
    found = [weight for weight in weights if is_fp8(weight)]
    if found:
        post_all_gather_processing(found)


def transposes(weights: Iterable[Any]) -> list[Tensor]:
    """Those of the FP8 weights among these."""
    return [weight._transpose for weight in weights if is_fp8(weight) and weight._transpose is not None]


@dataclass(frozen=True)
class Owned:
    """The range of one weight that this rank updates."""

    index: int
    """of the weight among those in FP8"""
    master: Tensor
    """fp32, flat"""
    data: Tensor
    """uint8, flat: its place in the model"""


def quantise(owned: list[Owned], inverses: list[Tensor], group: dist.ProcessGroup) -> None:
    """Make FP8 of the masters, and set every weight's inverse scale. inverses: of all weights, the same on every rank of the group, fp32 [1] each.

    Nothing waits for the device. Called by all ranks of the group.
    """
    device = inverses[0].device
    amaxes = torch.zeros(len(inverses), dtype=torch.float32, device=device)
    if owned:
        places = torch.tensor([one.index for one in owned])
        amaxes[places.to(device, non_blocking=True)] = largest([one.master for one in owned])
    dist.all_reduce(amaxes, op=dist.ReduceOp.MAX, group=group)
    scales, new = scales_of(amaxes)
    torch._foreach_copy_(inverses, list(new.split(1)))
    for one in owned:
        fp8_cast(one.master, scales[one.index], one.data)


class Fp8Weights:
    """Those of one of megatron-core's distributed optimizers. group: the ranks that hold the same weights."""

    def __init__(self, part: Any, group: dist.ProcessGroup) -> None:
        self.group = group
        weights = [weight for buffer in getattr(part, "buffers", []) for weight in buffer.params if is_fp8(weight)]
        self.inverses = [weight._scale_inv for weight in weights]
        self.owned: list[Owned] = []
        places = {id(weight): index for index, weight in enumerate(weights)}
        for index, models in enumerate(part.model_float16_groups if weights else []):
            first = len(part.model_fp32_groups[index])
            for order, weight in enumerate(models):
                if is_fp8(weight):
                    owned = _owned(part, weight, places[id(weight)])
                    self.owned.append(owned)
                    # where megatron-core leaves a gap: it would keep the master as another optimizer's
                    part.shard_float16_groups[index][order] = owned.master
                    part.optimizer.param_groups[index]["params"][first + order] = owned.master
        for weight in weights:
            if hasattr(weight, "clear_high_precision_init_val"):
                weight.clear_high_precision_init_val()

    @torch.no_grad()
    def quantise(self) -> None:
        """Make FP8 of the masters, on every rank; weights are to be gathered after it."""
        if self.inverses:
            quantise(self.owned, self.inverses, self.group)


def _owned(part: Any, weight: Any, index: int) -> Owned:
    """The range that this rank updates; its master holds what the weight was made of, before it became FP8."""
    quantizer = weight._get_quantizer()
    assert not quantizer.force_pow_2_scales and quantizer.amax_epsilon == 0, "other scales than ours"
    place = part._get_model_param_range_map(weight)["param"]
    made_of = weight.get_high_precision_init_val() if hasattr(weight, "get_high_precision_init_val") else weight.dequantize()
    master = made_of.detach().view(-1)[place.start : place.end].to(weight.device, copy=True).float()
    copy_tensor_model_parallel_attributes(master, weight)
    return Owned(index, master, weight._data.view(-1)[place.start : place.end])
