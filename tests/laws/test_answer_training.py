"""The loss of answers alone is transformers' with the other labels -100; it is one curve for every layout, and a resumed run is the unbroken one."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from answer_blend import Document, write_answer_blend, write_answers
from tiny_models import write_tiny
from training import VOCAB_SIZE, differing, final_state, from_random, largest_difference, metrics, recipe, run_cases

from megatron_prism.config import load_recipe
from megatron_prism.data_prep.blend import load_blend
from megatron_prism.engine import checkpoint, loop, parallel, run_folder
from megatron_prism.engine.data import SampleReader
from megatron_prism.engine.packed_data import PackedReader, open_reader
from megatron_prism.engine.recipe import TrainConfig
from megatron_prism.engine.recipe_blocks import DataSection
from megatron_prism.errors import UserError
from megatron_prism.stages import convert

BOUND = 1e-5
STEPS, HALF, BATCH, SEQ_LEN = 4, 2, 4, 32
PACKED: dict[str, Any] = {
    "data__packing__pad_multiple": 4,
    "data__packing__over_length": "split",
    "data__packing__overlap": 1,
    "data__packing__window_documents": 20,
}
SETTINGS: dict[str, Any] = {
    "steps": STEPS,
    "global_batch": BATCH,
    "optimizer__lr": 1e-3,
    "data__loss": "answers",
    "data__mask_end_of_document": False,
    "checkpoint__save_interval": HALF,
    "checkpoint__keep_last": None,
}
KINDS = {"end_to_end": {}, "packed": PACKED}
IGNORED = -100


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("answer_training")
    write_tiny("llama", root / "hf", vocab_size=VOCAB_SIZE)
    convert.run(convert.Config(direction="import", source=root / "hf", output=root / "checkpoint"))
    yield root
    parallel.stop()


@pytest.fixture(scope="module")
def chat(root: Path) -> list[Document]:
    return write_answer_blend(root / "data", VOCAB_SIZE, chat_loss=None, web=False)[1]["train"]


def config(root: Path, run: str, kind: str, **settings: Any) -> TrainConfig:
    start = {"model__checkpoint": str(root / "checkpoint")}
    return load_recipe(None, recipe(root, root / run, **start, **{**SETTINGS, **KINDS[kind], **settings}), TrainConfig)


@pytest.fixture(scope="module")
def one_rank(root: Path, chat: list[Document]) -> dict[str, Path]:
    return {kind: loop.train(config(root, kind, kind)) for kind in KINDS}


def rows_of(reader: SampleReader, chat: list[Document], index: int) -> list[tuple[list[int], list[int]]]:
    """(tokens, labels) of what a sample shows the model, from the documents as they were written: a window, or each packed piece by itself."""
    if isinstance(reader, PackedReader):
        pieces = [[(span.document, span.start, span.length, span.repeated)] for span in reader.packed.sample(index).spans]
    else:
        pieces = [[(span.document, span.offset, span.length, 0) for span in reader.sampler.sample(index).spans]]
    rows = []
    for row in pieces:
        tokens = [token for document, start, length, _ in row for token in chat[document][0][start : start + length]]
        learnt = [bit for document, start, length, _ in row for bit in chat[document][1][start : start + length]]
        learnt[: row[0][3]] = [False] * row[0][3]  # learnt in the chunk before
        rows.append((tokens, [token if bit else IGNORED for token, bit in zip(tokens, learnt, strict=True)]))
    return rows


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_loss_is_that_of_transformers_with_all_other_labels_ignored(root, chat, one_rank, kind):
    from transformers import AutoModelForCausalLM

    cfg = config(root, kind, kind)
    data = DataSection(blend=cfg.data.blend, seq_len=SEQ_LEN, loss="answers", packing=cfg.data.packing)
    reader = open_reader(load_blend(cfg.data.blend), "train", data)
    model = AutoModelForCausalLM.from_pretrained(root / "hf", dtype=torch.float32)
    total, count = 0.0, 0
    with torch.no_grad():
        for tokens, labels in (row for index in range(BATCH) for row in rows_of(reader, chat, index)):
            counted = sum(label != IGNORED for label in labels[1:])
            if counted:
                total += float(model(torch.tensor([tokens]), labels=torch.tensor([labels])).loss) * counted
            count += counted
    first = metrics(one_rank[kind])[0]
    assert 0 < count < 0.9 * BATCH * SEQ_LEN
    assert first["loss"] == pytest.approx(total / count, rel=BOUND)
    assert first["loss_share"] == count / (BATCH * SEQ_LEN)


def test_all_tokens_are_another_loss(root, chat, one_rank):
    everything = loop.train(config(root, "everything", "end_to_end", data__loss="all", steps=1, checkpoint__save_interval=None))
    first = metrics(everything)[0]
    assert first["loss_share"] == 1
    assert abs(first["loss"] / metrics(one_rank["end_to_end"])[0]["loss"] - 1) > 100 * BOUND


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_an_unbroken_run(root, one_rank, kind):
    resumed = root / f"resumed_{kind}"
    shutil.copytree(one_rank[kind], resumed)
    (resumed / "COMPLETE").unlink()
    checkpoint.remove(run_folder.step_folder(resumed, STEPS))
    loop.train(config(root, resumed.name, kind))
    assert [line["loss"] for line in metrics(resumed)] == [line["loss"] for line in metrics(one_rank[kind])]
    assert differing(final_state(resumed), final_state(one_rank[kind])) == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_layout_gives_the_curve_of_one_rank_however_uneven_the_answers(root, one_rank):
    cases = {
        f"{kind} {layout}": {"set": {**settings, **KINDS[kind]}}
        for kind in KINDS
        for layout, settings in {
            "dp": {},
            "tp_sp": {"parallel__tp": 2, "parallel__sp": "true"},
            "pp": {"parallel__pp": 2},
            "cp": {"parallel__cp": 2},
        }.items()
    }
    start = {"model__checkpoint": str(root / "checkpoint")}
    found = run_cases(root, 2, cases, timeout=280, **{**SETTINGS, **start, "checkpoint__save_interval": None})
    differences = {case: largest_difference(lines, metrics(one_rank[case.split()[0]])) for case, lines in found.items()}
    assert max(differences.values()) < BOUND, differences


def test_a_validation_in_which_nothing_counts_is_said_to_be_so(tmp_path):
    blend, documents = write_answer_blend(tmp_path / "data", VOCAB_SIZE, web=False)
    shutil.rmtree(tmp_path / "data" / "chat" / "validation")
    questions = [(tokens, [False] * len(tokens)) for tokens, _ in documents["validation"]]
    questions[0][1][-1] = True  # one answer, in a document that four samples do not reach
    write_answers(tmp_path / "data" / "chat" / "validation", questions, VOCAB_SIZE)
    settings = SETTINGS | {"data__blend": str(blend), "steps": 1, "validation__interval": 1, "validation__batches": 1} | from_random(tmp_path)
    try:
        with pytest.raises(UserError, match="none of the 4 validation samples has a token that counts"):
            loop.train(load_recipe(None, recipe(tmp_path, tmp_path / "run", **settings), TrainConfig))
    finally:
        parallel.stop()
