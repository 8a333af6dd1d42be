"""Which tokens a context-parallel rank holds, in which order all ranks' tokens lie end to end, which heads of a Mamba layer it scans, and a refusal.

The exchanges between ranks are proved by tests/laws/test_context_parallel.py.
"""

import numpy as np
import pytest
import torch
from training import TINY_LLAMA

from megatron_prism import families
from megatron_prism.config import ParallelConfig
from megatron_prism.engine.context_parallel import Order, chunks, order, order_of
from megatron_prism.engine.documents import documents
from megatron_prism.engine.mamba_share import ScannedPart, Share
from megatron_prism.engine.model import BuildOptions, build
from megatron_prism.engine.parallel import Mesh
from megatron_prism.errors import UserError
from megatron_prism.families.model_config import MambaConfig
from megatron_prism.planning.layout import make_plan

LENGTHS = [8, 4, 16, 4]


def tokens(lengths: list[int], cp: int, rank: int) -> list[int]:
    return [token for chunk in chunks(lengths, cp, rank) for token in range(chunk.start, chunk.stop)]


def order_from(lengths: list[int], cp: int) -> Order:
    return order(torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32), sum(lengths), cp)


def test_slices_are_those_that_transformer_engine_draws():
    """The two pictures in its attn_forward_func_with_cp: one sequence of 12, and documents of 8 and 4."""
    assert [tokens([12], 2, rank) for rank in (0, 1)] == [[0, 1, 2, 9, 10, 11], [3, 4, 5, 6, 7, 8]]
    assert [tokens([8, 4], 2, rank) for rank in (0, 1)] == [[0, 1, 6, 7, 8, 11], [2, 3, 4, 5, 9, 10]]
    assert tokens([7, 5], 1, 0) == list(range(12))


@pytest.mark.parametrize(("lengths", "cp"), [([48], 1), ([48], 2), ([48], 3), ([48], 4), (LENGTHS, 1), (LENGTHS, 2), ([24, 12, 36], 3)])
def test_the_order_on_the_device_is_that_of_the_slices(lengths, cp):
    found = order_from(lengths, cp)
    laid_end_to_end = torch.tensor([token for rank in range(cp) for token in tokens(lengths, cp, rank)])
    assert torch.equal(laid_end_to_end[found.places], torch.arange(sum(lengths)))
    assert torch.equal(found.tokens, laid_end_to_end)


def test_a_document_that_does_not_cut_evenly_is_refused():
    with pytest.raises(AssertionError, match=r"2 \* cp = 4 must divide a document of 6 tokens"):
        chunks([8, 6], 2, 0)


def test_the_order_of_a_micro_batch_is_worked_out_once():
    packed = documents(torch.tensor([0, 8, 12], dtype=torch.int32), (8, 4))
    assert order_of(packed, 12, 2, torch.device("cpu")) is order_of(packed, 12, 2, torch.device("cpu"))
    assert order_of(None, 12, 2, torch.device("cpu")) is order_of(None, 12, 2, torch.device("cpu"))
    assert torch.equal(order_of(None, 12, 2, torch.device("cpu")).tokens[:6], torch.tensor([0, 1, 2, 9, 10, 11]))


@pytest.mark.parametrize(("groups", "tp", "cp"), [(4, 1, 2), (4, 1, 4), (4, 2, 2), (4, 2, 4), (4, 1, 8), (2, 4, 2), (1, 2, 4), (1, 4, 2), (2, 2, 2)])
def test_every_head_is_scanned_once_with_its_own_group(groups, tp, cp):
    """x is numbered by head, B and C by group; heads of one group are neighbours."""
    mamba = MambaConfig(num_heads=8, head_dim=3, state_dim=2, num_groups=groups, conv_kernel=4, chunk_size=4, norm_groups=groups)
    seen = []
    for tp_rank in range(tp):
        share = Share(mamba, tp, tp_rank)
        heads = torch.arange(8).chunk(tp)[tp_rank]
        made = torch.arange(groups) if share.replicated else torch.arange(groups).chunk(tp)[tp_rank]
        channels = torch.cat([heads.repeat_interleave(3), *[made.repeat_interleave(2)] * 2])
        for rank in range(cp):
            part = ScannedPart(share, cp, rank)
            x, b, c = (channels[where] for where in part.channels)
            of_x, of_bc = part.convolved
            convolved = torch.cat([channels[: share.inner][where] for where in of_x] + [channels[share.inner :][where] for where in of_bc])
            assert not of_bc or torch.equal(convolved, torch.cat([x, b, c]))
            own = heads[part.heads]
            assert torch.equal(x, own.repeat_interleave(3))
            assert torch.equal(b, c) and len(b) == 2 * part.groups
            assert torch.equal(b[::2].repeat_interleave(len(own) // part.groups), own // (8 // groups))
            seen += own.tolist()
    assert seen == list(range(8))


def test_transformer_engine_has_no_exchange_in_fp32():
    model = families.find(TINY_LLAMA).model_config(TINY_LLAMA)
    mesh = Mesh(make_plan(model, ParallelConfig(cp=2), 2, 32, 8, 1), groups=None, rank=0, tp_rank=0, pp_rank=0, dp_rank=0, cp_rank=0)
    with pytest.raises(UserError, match=r"parallel\.cp=2 with precision=fp32: .*use precision=bf16, or layers=local"):
        build(model, mesh, BuildOptions(precision="fp32", layers="transformer_engine"), torch.device("cpu"))
