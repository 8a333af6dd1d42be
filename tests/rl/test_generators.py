"""A generator's turns and weights: memory is free before it wakes, one rank's error is everyone's, and marks that text loses are refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rl_runs
import torch
from idle_generator import IdleGenerator
from tiny_hf import make_tiny_tokenizer
from transformers import AutoTokenizer

from megatron_prism.engine import parallel
from megatron_prism.errors import UserError
from megatron_prism.rl import generators


class Recorded(IdleGenerator):
    """A generator that writes down when it is woken and put to sleep, and how much of new weights it takes before it fails."""

    def __init__(self, events: list[str], takes: int | None = None) -> None:
        self.events, self.takes = events, takes

    def wake(self) -> None:
        self.events.append("wake")

    def sleep(self) -> None:
        self.events.append("sleep")

    def update_weights(self, tensors: Iterator[Any], version: int | None = None) -> None:
        for _ in range(self.takes or 0):
            next(tensors)
        raise UserError("the server does not know this tensor")


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    parallel.start(torch.device("cpu"))
    yield
    parallel.stop()


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens, in order."""
    found: list[str] = []
    monkeypatch.setattr(generators, "free_cached_memory", lambda: found.append("free"))
    monkeypatch.setattr("torch.distributed.barrier", lambda: found.append("barrier"))
    return found


def test_every_rank_frees_its_memory_before_any_generator_wakes(events, tmp_path):
    cfg = rl_runs.config(tmp_path, tmp_path / "run")
    generators.wake(cfg, Recorded(events))
    assert events == ["free", "barrier", "wake"]
    generators.wake(cfg, None)
    assert events[3:] == ["free", "barrier"], "a rank without a generator lets go too, or rank 0 waits for it for ever"


def test_generators_that_do_not_sleep_take_no_turns(events, tmp_path):
    cfg = rl_runs.config(tmp_path, tmp_path / "run", generator_sleeps=False)
    generators.wake(cfg, Recorded(events)), generators.sleep(cfg, Recorded(events))
    assert events == []


def test_memory_is_given_back_where_there_is_cuda_and_only_there(monkeypatch):
    freed: list[bool] = []
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: freed.append(True))
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    for available in (False, True):
        monkeypatch.setattr("torch.cuda.is_available", lambda there=available: there)
        generators.free_cached_memory()
    assert freed == [True]


@pytest.mark.parametrize("takes", [0, 2, 5])
def test_a_generator_that_refuses_weights_leaves_no_rank_in_their_exchange(takes, monkeypatch, tmp_path):
    exchanged: list[int] = []

    def stream(*_: Any, **__: Any) -> Iterator[tuple[str, int]]:
        for bucket in range(5):
            exchanged.append(bucket)
            yield f"tensor {bucket}", bucket

    monkeypatch.setattr(generators, "weight_stream", stream)
    told: list[Any] = []
    monkeypatch.setattr(generators, "on_all", lambda work: told.append(_error_of(work)))
    unread: Any = object()
    generators.update(rl_runs.config(tmp_path, tmp_path / "run"), Recorded([], takes), engine=unread, model=unread, step=1)
    assert exchanged == [0, 1, 2, 3, 4], "the other ranks are in all of these exchanges"
    assert "does not know this tensor" in told[0], "and what went wrong reaches them"


def _error_of(work: Any) -> str:
    with pytest.raises(UserError) as raised:
        work(0)
    return str(raised.value)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same tokenizer with marks that are text, special tokens, and ordinary added tokens."""
    folder = make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    plain, special, added = (AutoTokenizer.from_pretrained(folder) for _ in range(3))
    marks = ["<think>", "</think>", "<tool>", "</tool>"]
    special.add_special_tokens({"additional_special_tokens": marks})
    added.add_tokens(marks)
    return {"plain": plain, "special": special, "added": added}


REQUIRED: dict[str, Any] = {"reward__format": "required"}
OPENED: dict[str, Any] = {"reward__format": "opened"}
TOOL: dict[str, Any] = {"rollout__tool__max_calls": 2}


@pytest.mark.parametrize(
    ("settings", "key", "mark"), [(REQUIRED, "reward.format", "<think>"), (OPENED, "reward.format", "</think>"), (TOOL, "rollout.tool", "<tool>")]
)
def test_marks_that_are_special_tokens_are_refused_with_what_to_do(settings, key, mark, tokenizers, tmp_path: Path):
    cfg = rl_runs.config(tmp_path, tmp_path / "run", **settings)
    with pytest.raises(UserError, match=rf'{key} looks for {mark} in what.*back as \'\'.*"special": false'):
        generators.check_marks(cfg, tokenizers["special"])
    for name in ("plain", "added"):
        generators.check_marks(cfg, tokenizers[name])


def test_marks_that_nothing_looks_for_may_be_special(tokenizers, tmp_path: Path):
    generators.check_marks(rl_runs.config(tmp_path, tmp_path / "run"), tokenizers["special"])
