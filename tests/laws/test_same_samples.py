"""Law 5: the samples of a step are a function of blend, seed and step alone: not of the layout, the workers or restarts."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_blend import write_tiny_blend
from training import TINY_LLAMA, VOCAB_SIZE

from megatron_prism import families
from megatron_prism.config import ParallelConfig
from megatron_prism.data_prep.blend import load_blend
from megatron_prism.engine.data import SampleReader
from megatron_prism.engine.parallel import Mesh
from megatron_prism.planning.layout import make_plan

SEQ_LEN, GLOBAL_BATCH, STEPS = 32, 16, 5


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_blend(tmp_path_factory.mktemp("blend"), VOCAB_SIZE)


def open_samples(blend: Path) -> SampleReader:
    """As a fresh process would."""
    return SampleReader(load_blend(blend), "train", SEQ_LEN, mask_end_of_document=True)


def rows_of_steps(blend: Path, world_size: int, micro_batch: int, **parallel: int) -> list[list[bytes]]:
    """The token rows of each step over all data-parallel ranks, in the order of samples."""
    model = families.find(TINY_LLAMA).model_config(TINY_LLAMA)
    plan = make_plan(model, ParallelConfig(**parallel), world_size, SEQ_LEN, GLOBAL_BATCH, micro_batch)
    steps = []
    for step in range(STEPS):
        found: dict[int, bytes] = {}
        for dp_rank in range(plan.dp):
            mesh = Mesh(plan, groups=None, rank=0, tp_rank=0, pp_rank=0, dp_rank=dp_rank, cp_rank=0)
            batches = list(open_samples(blend).step(step * GLOBAL_BATCH, mesh, torch.device("cpu")))
            assert len(batches) == plan.num_microbatches
            for number, batch in enumerate(batches):
                first = (number * plan.dp + dp_rank) * micro_batch
                found |= {first + row: torch.cat([batch.tokens[row], batch.labels[row, -1:]]).numpy().tobytes() for row in range(micro_batch)}
        steps.append([found[sample] for sample in range(GLOBAL_BATCH)])
    return steps


@pytest.mark.parametrize(
    ("world_size", "micro_batch", "parallel"),
    [(2, 1, {}), (4, 2, {}), (8, 1, {"tp": 2}), (2, 4, {"pp": 2}), (16, 1, {"tp": 2, "pp": 2}), (4, 1, {"pp": 2, "vpp": 2})],
)
def test_samples_are_the_same_for_every_layout(blend, world_size, micro_batch, parallel):
    assert rows_of_steps(blend, world_size, micro_batch, **parallel) == rows_of_steps(blend, 1, 1)


def test_labels_are_the_next_tokens_and_the_mask_follows_each_end_of_document(blend):
    reader = open_samples(blend)
    batch = reader.micro_batch(range(8))
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
    assert torch.equal(batch.loss_mask == 0, batch.tokens == 0)
    assert 0 < int((batch.loss_mask == 0).sum()) < batch.loss_mask.numel() / 2
    assert all(tensor.is_contiguous() for tensor in vars(batch).values())  # what the copy to a GPU pins


def test_sources_are_drawn_in_exactly_the_counted_shares(blend):
    reader = open_samples(blend)
    drawn = Counter(reader.tokens(index)[1] for index in range(400))
    assert [drawn[0], drawn[1]] == list(reader.sampler.counts(400)) == [300, 100]
