"""Which tokens count in a batch where a source teaches its answers alone: those that the masks say, end to end or packed; and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answer_blend import Document, write_answer_blend
from training import VOCAB_SIZE, from_random, recipe

from megatron_prism.config import load_recipe
from megatron_prism.data_prep.blend import load_blend
from megatron_prism.engine import checkpoint, data_plan
from megatron_prism.engine.data import SampleReader
from megatron_prism.engine.packed_data import PackedReader, open_reader
from megatron_prism.engine.recipe import TrainConfig
from megatron_prism.engine.recipe_blocks import DataSection, PackingSection
from megatron_prism.errors import UserError

SEQ_LEN = 32
PACKING = PackingSection(pad_multiple=4, over_length="split", overlap=1, window_documents=20)
Written = tuple[Path, dict[str, list[Document]]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_answer_blend(tmp_path_factory.mktemp("answers"), VOCAB_SIZE)


def open_split(blend: Path, split: str = "train", **settings: Any) -> SampleReader:
    return open_reader(load_blend(blend), split, DataSection(blend=blend, seq_len=SEQ_LEN, **settings))


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("mask_end", [False, True])
def test_labels_that_are_no_answers_do_not_count_where_documents_lie_end_to_end(written, split, mask_end):
    blend, chat = written
    reader = open_split(blend, split, mask_end_of_document=mask_end)
    seen = 0
    for index in range(40):
        batch, sample = reader.micro_batch(range(index, index + 1)), reader.sampler.sample(index)
        row = reader.tokens(index)[0]
        assert batch.tokens[0].tolist() == row[:-1].tolist() and batch.labels[0].tolist() == row[1:].tolist()
        if reader.names[sample.source] == "web":
            bits = np.ones(SEQ_LEN + 1, bool)
        else:
            bits = np.array([bit for span in sample.spans for bit in chat[split][span.document][1][span.offset : span.offset + span.length]])
            seen += 1
        expected = bits[1:] & (row[:-1] != 0) if mask_end else bits[1:]
        assert batch.loss_mask[0].tolist() == expected.astype(float).tolist()
    assert 20 < seen < 40


@pytest.mark.parametrize("split", ["train", "validation"])
def test_labels_that_are_no_answers_do_not_count_where_documents_are_packed(written, split):
    blend, chat = written
    reader = open_split(blend, split, packing=PACKING)
    assert isinstance(reader, PackedReader)
    learnt = 0.0
    buffers = [index for index in range(400) if reader.sampler.turn(index)[0] == 0][: reader.packed.sources[0].buffers_in_epoch]
    for index in buffers:
        batch = reader.micro_batch(range(index, index + 1))
        expected = np.zeros(SEQ_LEN)
        for span in reader.packed.sample(index).spans:
            bits = chat[split][span.document][1][span.start : span.start + span.length]
            for place in range(max(span.repeated, 1), span.length):
                expected[span.offset + place - 1] = bits[place]
        assert batch.loss_mask[0].tolist() == expected.tolist()
        learnt += float(batch.loss_mask.sum())
    assert learnt == sum(sum(bits[1:]) for _, bits in chat[split]), "each answer of an epoch counts once"


def test_the_choice_of_the_recipe_is_for_sources_that_the_blend_says_nothing_of(tmp_path):
    blend, _ = write_answer_blend(tmp_path, VOCAB_SIZE, chat_loss=None, web=False)
    assert open_split(blend).micro_batch(range(4)).loss_mask.mean() == 1
    assert open_split(blend, loss="answers").micro_batch(range(4)).loss_mask.mean() < 0.9
    (tmp_path / "blend.toml").write_text(blend.read_text().replace("train =", 'loss = "all"\ntrain =', 1))
    assert open_split(blend, loss="answers").micro_batch(range(4)).loss_mask.mean() == 1


def config(root: Path, **settings: Any) -> TrainConfig:
    return load_recipe(None, recipe(root, root / "run", **from_random(root), **settings), TrainConfig)


def test_answers_of_a_source_without_marks_are_refused_before_torch_is_needed_with_the_ways_out(tmp_path):
    blend, _ = write_answer_blend(tmp_path / "data", VOCAB_SIZE)
    words = (
        r"the loss of web is to count answers alone.*prepare the source again \(messages.*set loss = 'all' for it in blend.toml, or data.loss='all'"
    )
    with pytest.raises(UserError, match=words):
        data_plan.check(config(tmp_path, data__loss="answers"))
    with pytest.raises(UserError, match=words):
        open_split(blend, loss="answers")
    data_plan.check(config(tmp_path))
    blend.write_text(blend.read_text().replace('train = "web/train"', 'loss = "all"\ntrain = "web/train"'))
    data_plan.check(config(tmp_path, data__loss="answers"))
    with pytest.raises(UserError, match=r"data\.loss"):
        config(tmp_path, data__loss="questions")


def test_a_split_without_a_single_answer_is_refused(tmp_path):
    blend, chat = write_answer_blend(tmp_path, VOCAB_SIZE)
    from answer_blend import write_answers

    empty = [(tokens, [False] * len(tokens)) for tokens, _ in chat["validation"]]
    write_answers(tmp_path / "none" / "validation", empty, VOCAB_SIZE)
    blend.write_text(blend.read_text().replace("chat/validation", "none/validation"))
    with pytest.raises(UserError, match=r"none/validation holds no answer"):
        open_split(blend, "validation")


def test_the_line_for_people_and_the_dry_run_say_what_counts(tmp_path):
    _, chat = write_answer_blend(tmp_path / "data", VOCAB_SIZE)
    share = sum(sum(bits) for _, bits in chat["train"]) / sum(len(bits) for _, bits in chat["train"])
    line = f"the loss counts answers alone: chat {share:.2%} of its tokens; of the other sources all tokens"
    assert open_split(tmp_path / "data").loss_line == line
    assert data_plan.describe(config(tmp_path)).splitlines()[-1] == line


def test_what_is_learnt_of_a_source_may_not_change_within_a_run(written):
    blend, _ = written
    answers, everything = (open_split(blend), SampleReader(blend_with(load_blend(blend), "all"), "train", SEQ_LEN, False))
    progress = checkpoint.Progress(step=1, samples=8, data=answers.fingerprint)
    checkpoint.check_data(progress, open_split(blend).fingerprint)
    for on_change in ("refuse", "replan"):
        with pytest.raises(UserError, match=r"source chat: loss was 'answers', now 'all'") as refusal:
            checkpoint.check_data(progress, everything.fingerprint, on_change)
        assert "digest" not in str(refusal.value)
    before = checkpoint.Progress(step=1, samples=8, data=everything.fingerprint)
    with pytest.raises(UserError, match=r"source chat: loss was 'all', now 'answers'"):
        checkpoint.check_data(before, answers.fingerprint)


def blend_with(blend: Any, loss: str) -> Any:
    from dataclasses import replace

    return replace(blend, sources=tuple(replace(source, loss=loss) for source in blend.sources))
