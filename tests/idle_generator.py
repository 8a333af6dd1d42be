"""What scripted generators of tests have in common: nothing to hand over or to give back, and no model to score with or to be given weights for.

class Scripted(IdleGenerator):
    def generate_requests(self, requests, sampling, on_done): ...
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.generate.interface import Generator, OnDone, Request, Sampling


class IdleGenerator(Generator):
    """Takes its turns and its end, and fails the test that asks it for what it has no model for."""

    def generate_requests(self, requests: Sequence[Request], sampling: Sampling, on_done: OnDone) -> None:
        pytest.fail("this generator was told to write nothing")

    def score(self, pairs: Any) -> Any:
        pytest.fail("a scripted generator has no model to score with")

    def update_weights(self, tensors: Any, version: int | None = None) -> None:
        pytest.fail("a scripted generator has no weights")

    def reload(self, folder: Path) -> None:
        pytest.fail("a scripted generator has no weights")

    def sleep(self) -> None:
        pass

    def wake(self) -> None:
        pass

    def close(self) -> None:
        pass
