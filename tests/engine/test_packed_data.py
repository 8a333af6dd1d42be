"""Packed micro-batches: whole documents as the shards have them, with where they end; and what a recipe of them may not say."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from tiny_blend import write_tiny_blend
from training import TINY_LLAMA, VOCAB_SIZE, from_random, recipe

from megatron_prism import families
from megatron_prism.config import ParallelConfig, load_recipe
from megatron_prism.data_prep.blend import load_blend
from megatron_prism.data_prep.packing import pack
from megatron_prism.engine import checkpoint
from megatron_prism.engine.data import SampleReader
from megatron_prism.engine.packed_data import PackedBatch, PackedReader, open_reader
from megatron_prism.engine.parallel import Mesh
from megatron_prism.engine.recipe import TrainConfig
from megatron_prism.engine.recipe_blocks import DataSection, PackingSection
from megatron_prism.errors import UserError
from megatron_prism.planning.layout import make_plan

SEQ_LEN, CPU = 32, torch.device("cpu")
PACKING = PackingSection(pad_multiple=4, over_length="split", overlap=1, window_documents=20)


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_blend(tmp_path_factory.mktemp("packed"), VOCAB_SIZE)


def open_packed(blend: Path, split: str = "train", **changes: Any) -> PackedReader:
    data = DataSection(blend=blend, seq_len=SEQ_LEN, packing=PACKING.model_copy(update=changes))
    found = open_reader(load_blend(blend), split, data)
    assert isinstance(found, PackedReader)
    return found


def parts(batch: PackedBatch, row: torch.Tensor) -> list[torch.Tensor]:
    """A row's documents, padding included."""
    return list(row[0].split(list(batch.lengths)))


def test_a_batch_is_whole_documents_whose_next_tokens_are_to_be_learnt(blend):
    """Documents of the tiny blend count upwards by a stride of their own, then end with a zero: every token shows its place."""
    reader = open_packed(blend)
    chunks = learnt = 0
    for index in range(60):
        batch = reader.micro_batch(range(index, index + 1))
        assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape == batch.positions.shape == (1, SEQ_LEN)
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.cu_seqlens.diff().tolist() == list(batch.lengths)
        assert all(length % 4 == 0 for length in batch.lengths) and sum(batch.lengths) == SEQ_LEN
        rows = (parts(batch, row) for row in (batch.tokens, batch.labels, batch.loss_mask, batch.positions))
        for tokens, labels, mask, positions in zip(*rows, strict=True):
            assert positions.tolist() == list(range(len(tokens)))
            if not mask.any():  # the buffer's tail
                assert set(tokens.tolist()) == {0}
                continue
            size = int(mask.nonzero().max()) + 2  # tokens, the last of which has no label
            assert torch.equal(mask, (torch.arange(len(mask)) < size - 1).float())
            assert torch.equal(labels[: size - 1], tokens[1:size])
            steps = tokens[:size].diff() % (VOCAB_SIZE - 1)
            chunks += int(tokens[size - 1]) != 0  # only a document that is cut ends otherwise
            assert len(set(steps[: size - 2].tolist())) <= 1
            learnt += int(mask.sum())
    assert chunks > 5 and learnt > 1000


def test_an_epoch_learns_every_token_but_each_documents_first_once(blend):
    reader = open_packed(blend)
    source = reader.packed.sources[0]
    in_epoch = source.buffers_in_epoch
    batches = [reader.micro_batch(range(index, index + 1)) for index in range(4 * in_epoch)]
    own = [batch for batch in batches if int(batch.sources) == 0][:in_epoch]
    documents = reader.lengths[0]
    assert sum(float(batch.loss_mask.sum()) for batch in own) == documents.sum() - len(documents)


def test_a_mask_after_each_end_of_document_changes_nothing_where_documents_end_alone(blend):
    data = DataSection(blend=blend, seq_len=SEQ_LEN, packing=PACKING, mask_end_of_document=True)
    masked = open_reader(load_blend(blend), "train", data)
    for index in range(20):
        place = range(index, index + 1)
        assert torch.equal(masked.micro_batch(place).loss_mask, open_packed(blend).micro_batch(place).loss_mask)


def test_boundaries_for_the_layers_are_made_once_and_need_no_look_at_the_device(blend):
    batch = open_packed(blend).micro_batch(range(3, 4))
    params = batch.packed_seq_params
    assert params is batch.packed_seq_params
    assert (params.qkv_format, params.max_seqlen_q, params.max_seqlen_kv) == ("thd", max(batch.lengths), max(batch.lengths))
    assert params.cu_seqlens_q is batch.cu_seqlens and params.cu_seqlens_q_padded is None
    assert params.ids.tolist() == [np.repeat(np.arange(len(batch.lengths)), batch.lengths).tolist()]
    assert {"positions", "cu_seqlens"} < set(batch.copied)
    plain = SampleReader(load_blend(blend), "train", SEQ_LEN, mask_end_of_document=False).micro_batch(range(1))
    assert plain.packed_seq_params is None


def batches_of_steps(blend: Path, world_size: int, global_batch: int = 8, **parallel: int) -> list[list[bytes]]:
    """The tokens of each step over all data-parallel ranks, in the order of samples; every rank opens the blend anew."""
    model = families.find(TINY_LLAMA).model_config(TINY_LLAMA)
    plan = make_plan(model, ParallelConfig(**parallel), world_size, SEQ_LEN, global_batch, 1)
    steps = []
    for step in range(3):
        found: dict[int, bytes] = {}
        for dp_rank in range(plan.dp):
            mesh = Mesh(plan, groups=ProcessGroupCollection(), rank=0, tp_rank=0, pp_rank=0, dp_rank=dp_rank, cp_rank=0)
            reader = open_packed(blend)
            for number, batch in enumerate(reader.step(step * global_batch, mesh, CPU)):
                assert isinstance(batch, PackedBatch)
                found[number * plan.dp + dp_rank] = batch.tokens.numpy().tobytes() + batch.cu_seqlens.numpy().tobytes()
            reader.close()
        steps.append([found[sample] for sample in range(global_batch)])
    return steps


def test_samples_are_the_same_for_every_layout(blend):
    expected = batches_of_steps(blend, 1)
    assert len({sample for step in expected for sample in step}) > 20  # a small source comes around
    assert batches_of_steps(blend, 4) == batches_of_steps(blend, 4, tp=2) == batches_of_steps(blend, 2, pp=2) == expected


def test_validation_is_packed_too_every_held_out_document_once_before_any_twice(blend):
    reader = open_packed(blend, "validation")
    for number, source in enumerate(reader.packed.sources):
        lengths = reader.lengths[number]
        held_out = sorted(tuple(reader.readers[number].read(document, 0, int(length))) for document, length in enumerate(lengths))
        assert len(held_out) == {"code": 20, "math": 8}[reader.names[number]]
        epoch = source.buffers_in_epoch
        places = [index for index in range(8 * epoch) if reader.packed.schedule.turn(index)[0] == number][:epoch]
        batches = [reader.micro_batch(range(index, index + 1)) for index in places]
        assert all(int(batch.sources) == number and sum(batch.lengths) == SEQ_LEN for batch in batches)
        pieces = [span for ordinal in range(epoch) for span in source.spans(ordinal)]
        found: dict[int, list[int]] = {}
        for span in sorted(pieces):
            read = reader.readers[number].read(span.document, span.start, span.length)
            found.setdefault(span.document, []).extend(read[span.repeated :].tolist())
        assert sorted(map(tuple, found.values())) == held_out
        learnt = sum(float(batch.loss_mask.sum()) for batch in batches)
        assert learnt == lengths.sum() - len(lengths)


def test_the_line_at_the_start_says_how_full_the_first_windows_are(blend):
    reader = open_packed(blend, "validation", window_documents=100)  # all of a source in one window
    fills = [pack(lengths, reader.options).fill for lengths in reader.lengths]
    assert all(0.8 < fill <= 1.1 for fill in fills)  # tokens that chunks repeat count too
    assert reader.describe() == (
        f"packed documents: of the places in a buffer these hold a token: code {fills[0]:.2%}, math {fills[1]:.2%} (each source's first window)"
    )


@pytest.mark.parametrize("change", [{"pad_multiple": 8}, {"overlap": 2}, {"window_documents": 21}, {"over_length": "truncate", "overlap": 0}, None])
def test_a_changed_packing_is_refused_by_a_checkpoint(blend, change):
    progress = checkpoint.Progress(step=1, samples=8, data=open_packed(blend).fingerprint)
    checkpoint.check_data(progress, open_packed(blend).fingerprint)
    other = SampleReader(load_blend(blend), "train", SEQ_LEN, mask_end_of_document=False) if change is None else open_packed(blend, **change)
    with pytest.raises(UserError, match="packing was"):
        checkpoint.check_data(progress, other.fingerprint)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data__packing__pad_multiple": 5}, "pad_multiple=5 must divide seq_len=32"),
        ({"data__packing__overlap": 4}, "overlap=4 is for documents that are split"),
        ({"data__packing__over_length": "cut"}, "data.packing.over_length"),
        ({"data__packing__window_documents": 0}, "data.packing.window_documents"),
        ({"data__packing__pad_multiple": 4, "micro_batch": 2}, "micro_batch=2 must be 1 with data.packing"),
        ({"data__packing__pad_multiple": 2, "parallel__cp": 2}, "pad_multiple=2 must be a multiple of 2 . parallel.cp = 4; try 4"),
    ],
)
def test_what_does_not_go_together_is_refused_before_torch_is_needed(tmp_path, settings, words):
    with pytest.raises(UserError, match=words):
        load_recipe(None, recipe(tmp_path, tmp_path / "run", **from_random(tmp_path), **settings), TrainConfig)


def test_long_documents_are_refused_by_default_with_what_to_do(blend):
    with pytest.raises(UserError, match=r"source 'code': .* longer than seq_len=32.*over_length='split'"):
        open_packed(blend, over_length="refuse", overlap=0)
