"""Groups of ranks: all of them wait for each other as long as the start was given."""

from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from megatron_prism.engine import device, parallel
from megatron_prism.planning.layout import ParallelPlan

ALONE = ParallelPlan(tp=1, pp=1, vpp=None, cp=1, dp=1, sp=False, micro_batch=1, num_microbatches=1, padded_vocab_size=128)
EXPERTS = "EXPERT_DATA_PARALLEL_GROUP_GLOO"
"""megatron-core gives this one no timeout; there are no experts here to wait for each other in it"""


@pytest.mark.parametrize("minutes", [180, 30])
def test_every_group_of_a_mesh_waits_as_long_as_the_default_group(minutes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, timedelta | None] = {}
    right = dist.new_group

    def new_group(*ranks: Any, **settings: Any) -> Any:
        given[settings["group_desc"]] = settings.get("timeout")
        return right(*ranks, **settings)

    monkeypatch.setattr(dist, "new_group", new_group)
    parallel.stop()  # a test before this one may have left its own groups
    parallel.start(device.setup("cpu"), minutes)
    try:
        parallel.build_mesh(ALONE, seed=1)
    finally:
        parallel.stop()
    given.pop(EXPERTS)
    assert "TENSOR_MODEL_PARALLEL_GROUP" in given and set(given.values()) == {timedelta(minutes=minutes)}, given
