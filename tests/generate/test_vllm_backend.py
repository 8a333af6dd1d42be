"""Which GPUs a server of vLLM gets, and the seeds of its answers: no server is started."""

import os
from pathlib import Path

import pytest

from megatron_prism.errors import UserError
from megatron_prism.evals.ranks import Ranks
from megatron_prism.generate.settings import BackendConfig
from megatron_prism.generate.vllm_backend import gpu_groups, stream_seed


def test_servers_take_turns_of_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def groups(environment: dict[str, str], **settings: int) -> list[list[str] | None]:
        return gpu_groups(BackendConfig.model_validate({"backend": "vllm", **settings}), environment)

    assert groups({}) == [None]
    assert groups({"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, servers=2, tensor_parallel=2) == [["4", "5"], ["6", "7"]]
    assert groups({"LOCAL_RANK": "1"}, tensor_parallel=2) == [["2", "3"]]
    assert groups({"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "a,b,c,d"}, servers=2) == [["c"], ["d"]]
    for name, value in {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "a,b,c,d"}.items():
        monkeypatch.setenv(name, value)
    Ranks(Path("out"), 1, 2).take_own_gpus(2)  # as an evaluation does before
    assert groups(dict(os.environ), servers=2) == [["c"], ["d"]]
    with pytest.raises(UserError, match="need 4 GPUs"):
        groups({"CUDA_VISIBLE_DEVICES": "0,1,2"}, servers=2, tensor_parallel=2)


def test_seeds_are_functions_of_three_numbers_and_differ() -> None:
    seeds = {stream_seed(seed, place, sample) for seed in range(10) for place in range(30) for sample in range(30)}
    assert len(seeds) == 9000 and all(0 <= seed < 2**63 for seed in seeds)
