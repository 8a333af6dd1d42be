"""Reading ahead of the step: the same batches as reading when they are needed, whatever happens in between, and no thread left behind."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from tiny_blend import write_tiny_blend
from training import TINY_LLAMA, VOCAB_SIZE

from megatron_prism import families
from megatron_prism.config import ParallelConfig
from megatron_prism.data_prep.blend import load_blend
from megatron_prism.engine import data as engine_data
from megatron_prism.engine.data import MicroBatch, SampleReader
from megatron_prism.engine.metrics import _line
from megatron_prism.engine.parallel import Mesh
from megatron_prism.engine.prefetch import Prefetcher
from megatron_prism.errors import UserError
from megatron_prism.planning.layout import make_plan

SEQ_LEN, CPU = 32, torch.device("cpu")


def reader_of(root: Path, split: str = "train") -> SampleReader:
    if not (root / "data").exists():
        write_tiny_blend(root / "data", VOCAB_SIZE)
    return SampleReader(load_blend(root / "data" / "blend.toml"), split, SEQ_LEN, mask_end_of_document=True)


def mesh_of(global_batch: int, micro_batch: int, ranks: int = 1, dp_rank: int = 0) -> Mesh:
    model = families.find(TINY_LLAMA).model_config(TINY_LLAMA)
    plan = make_plan(model, ParallelConfig(), ranks, SEQ_LEN, global_batch, micro_batch)
    return Mesh(plan, groups=ProcessGroupCollection(), rank=dp_rank, tp_rank=0, pp_rank=0, dp_rank=dp_rank, cp_rank=0)


def same(found: MicroBatch, expected: MicroBatch) -> bool:
    return all(torch.equal(getattr(found, name), value) for name, value in vars(expected).items())


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prism-prefetch")]


def settle(made: list[int], count: int) -> None:
    """Wait until `count` were made, and a moment longer for one too many."""
    end = time.monotonic() + 20
    while len(made) < count and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.1)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threads())
    yield
    assert set(threads()) <= before


@pytest.mark.parametrize(("global_batch", "micro_batch", "ranks", "dp_rank"), [(8, 2, 1, 0), (2, 2, 1, 0), (12, 1, 3, 2), (80, 1, 1, 0)])
def test_batches_are_those_of_direct_reading_bit_for_bit(tmp_path, global_batch, micro_batch, ranks, dp_rank):
    """Also with a step of 80 micro-batches, far more than are read ahead; from any sample; and after a jump, as a resumed run makes."""
    reader, direct = reader_of(tmp_path), reader_of(tmp_path)
    mesh = mesh_of(global_batch, micro_batch, ranks, dp_rank)
    assert 2 * engine_data.MICRO_BATCHES_AHEAD < 80
    for first in (0, global_batch, 2 * global_batch, 1003, 1003 + global_batch, 5):
        found = list(reader.step(first, mesh, CPU))
        starts = [first + (number * ranks + dp_rank) * micro_batch for number in range(mesh.plan.num_microbatches)]
        assert len(found) == len(starts)
        assert all(same(batch, direct.micro_batch(range(start, start + micro_batch))) for batch, start in zip(found, starts, strict=True))
    reader.close()


def test_a_step_left_in_the_middle_another_layout_and_other_callers_change_nothing(tmp_path):
    reader, direct = reader_of(tmp_path), reader_of(tmp_path)
    left = reader.step(0, mesh_of(8, 1), CPU)
    assert same(next(left), direct.micro_batch(range(1)))
    for first in range(0, 60, 6):  # other samples are read from this thread while the other one reads
        batches = list(reader.step(first, mesh_of(6, 3), CPU))
        assert same(reader.micro_batch(range(500 - first, 503 - first)), direct.micro_batch(range(500 - first, 503 - first)))
        assert same(batches[1], direct.micro_batch(range(first + 3, first + 6)))
    reader.close()


def test_a_later_batch_is_read_while_the_step_works(tmp_path):
    """The reader takes 0.1 s for a micro-batch and so does the step: it is waited for once, and what it took otherwise is hidden."""
    reader = reader_of(tmp_path)
    read = reader.micro_batch
    reader.micro_batch = lambda indices: (time.sleep(0.1), read(indices))[1]  # type: ignore[method-assign]
    for first in range(5):
        list(reader.step(first, mesh_of(1, 1), CPU))
        time.sleep(0.15)
    assert 0.09 < reader.waited_seconds < 0.4, reader.waited_seconds
    reader.close()


def test_a_slow_reader_is_waited_for_and_the_wait_is_counted(tmp_path):
    reader, direct = reader_of(tmp_path), reader_of(tmp_path)
    read = reader.micro_batch
    reader.micro_batch = lambda indices: (time.sleep(0.05), read(indices))[1]  # type: ignore[method-assign]
    batches = list(reader.step(0, mesh_of(6, 1), CPU))
    assert same(batches[5], direct.micro_batch(range(5, 6)))
    waited = reader.waited_seconds
    assert 0.29 < waited < 2
    reader.close()
    assert reader.waited_seconds == waited


def test_the_line_for_people_names_a_wait_above_one_percent_of_the_step_alone():
    metrics: dict[str, Any] = {"loss": 1.0, "lr": 1.0, "grad_norm": 1.0, "tokens_per_second": 1.0, "eta_seconds": 1.0, "seconds_per_step": 2.0}
    assert "data wait 3.2 %" in _line(1, 2, {**metrics, "data_wait_seconds": 0.064})
    assert "data wait" not in _line(1, 2, {**metrics, "data_wait_seconds": 0.02})


def test_a_failing_block_is_an_error_of_the_micro_batch_that_it_belongs_to(tmp_path):
    """The second shard of "math" is changed: batches before it come whole, the first that needs it raises what direct reading raises."""
    reader_of(tmp_path)
    path = tmp_path / "data" / "math" / "train" / "shard_00001.bin"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    reader, direct = reader_of(tmp_path), reader_of(tmp_path)
    place = 0
    with pytest.raises(UserError) as expected:
        for place in range(200):
            direct.micro_batch(range(place, place + 1))
    assert 0 < place < 100
    batches = reader.step(0, mesh_of(100, 1), CPU)
    assert [same(next(batches), direct.micro_batch(range(number, number + 1))) for number in range(place)] == [True] * place
    with pytest.raises(UserError) as found:
        next(batches)
    assert str(found.value) == str(expected.value)
    assert "shard_00001.bin, block 0" in str(found.value)
    with pytest.raises(UserError, match="block 0"):  # asked again, it fails again
        list(reader.step(place, mesh_of(1, 1), CPU))
    reader.close()


def test_no_more_is_made_than_was_asked_for_ahead():
    made: list[int] = []
    source = Prefetcher(lambda place: made.append(place) or place, stride=3, depth=4)
    assert source.get(10) == 10
    settle(made, 4)
    assert made == [10, 13, 16, 19]
    assert [source.get(13), source.get(16)] == [13, 16]
    settle(made, 6)
    assert made == [10, 13, 16, 19, 22, 25]
    source.close()


def test_closing_early_drops_what_waits_and_ends_the_thread():
    made: list[int] = []

    def slow(place: int) -> int:
        made.append(place)
        time.sleep(0.1)
        return place

    source = Prefetcher(slow, stride=1, depth=50)
    assert source.get(0) == 0
    source.close()
    assert len(made) < 5
    assert not threads()


def test_a_reader_that_nobody_closed_takes_its_thread_with_it(tmp_path):
    import gc

    reader = reader_of(tmp_path)
    next(iter(reader.step(0, mesh_of(8, 1), CPU)))
    assert threads()
    del reader
    end = time.monotonic() + 10
    while threads() and time.monotonic() < end:
        gc.collect()
        time.sleep(0.01)
    assert not threads()
