"""The loss of a step: the mean over the unmasked tokens of the whole global batch, whatever the layout and however uneven the masks.

megatron-core is given sums and token counts of micro-batches; it adds both up over the step and divides once (`calculate_per_token_loss`).
A mean of micro-batch means would weigh tokens of sparse micro-batches more.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_prism.engine.data import MicroBatch

LossParts = tuple[Tensor, Tensor, dict[str, Tensor]]


def masked_loss(batch: MicroBatch, num_sources: int) -> Callable[[Tensor], LossParts]:
    """The function that megatron-core calls on the last pipeline stage with the loss of each token, [b, s].

    It returns (sum over unmasked tokens, their number, {"by_source": [num_sources, 2]}): the same sum and number for each source of the blend.
    """

    def reduce(loss_bs: Tensor) -> LossParts:
        masked_bs = loss_bs.float() * batch.loss_mask
        tokens_b = batch.loss_mask.sum(dim=1)
        parts_b2 = torch.stack([masked_bs.detach().sum(dim=1), tokens_b], dim=1).double()
        by_source = torch.zeros(num_sources, 2, dtype=torch.float64, device=loss_bs.device).index_add_(0, batch.sources, parts_b2)
        return masked_bs.sum(), tokens_b.sum().to(torch.int), {"by_source": by_source}

    return reduce
