"""What one rank found, all have: results, errors, and a word that any rank heard."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from multirank import run_ranks

from megatron_prism.engine import parallel
from megatron_prism.engine.ranks import any_rank, on_all, on_main
from megatron_prism.errors import UserError


@pytest.fixture
def alone() -> Iterator[None]:
    parallel.start(torch.device("cpu"))
    yield
    parallel.stop()


@pytest.mark.usefixtures("alone")
def test_a_process_of_its_own_is_a_world_of_one() -> None:
    def fail(*_: int) -> None:
        raise UserError("the generator died")

    for work in (lambda: on_main(fail), lambda: on_all(fail)):
        with pytest.raises(UserError, match="the generator died"):
            work()
    assert on_main(lambda: 3) == 3 and on_all(lambda rank: rank + 1) == [1]
    assert [any_rank(heard, torch.device("cpu")) for heard in (True, False)] == [True, False]


def test_two_ranks_have_each_others_results_errors_and_words(tmp_path: Path) -> None:
    run_ranks(Path(__file__).with_name("told_ranks.py"), 2, str(tmp_path))
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["on_main"] == 0 and found["on_all"] == [0, 1]
        assert found["errors"]["main"] == ["rank 0 failed", "on rank 0"] and found["errors"]["second"] == ["rank 1 failed", "on rank 1"]
        assert found["errors"]["odd"] == ["TwoWordsError: not sent", "on rank 1"], "in words, since it cannot be sent as it is"
        assert found["heard"] == {"nobody": False, "the first": True, "the second": True, "both": True}
