"""A whole preparation of sources that know their answers: every mask bit against transformers' own tokenizer, in both splits, for each format."""

import json
from pathlib import Path

import numpy as np
import pytest
from prep_cases import texts

from megatron_prism.config import validate
from megatron_prism.data_prep.blend import load_blend
from megatron_prism.data_prep.manifest import Manifest, verify
from megatron_prism.data_prep.masks import MaskReader
from megatron_prism.data_prep.settings import PrepConfig
from megatron_prism.errors import UserError
from megatron_prism.stages import prep

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
"""Ends with the end of document, and has no {% generation %}."""
CHATML = TEMPLATE.replace("<|end|>", "<|end|>{{ '\\n' }}")
"""A line break behind every turn, as ChatML has it: also behind the last end of document."""
COUNT = 90


def rows() -> list[dict[str, object]]:
    """Chats of one to three exchanges over tricky texts."""
    words = [text.strip()[:60] for text in texts(400) if text.strip()]
    chats = []
    for number in range(COUNT):
        turns = [{"role": role, "content": words[(7 * number + place) % 400]} for place, role in enumerate(["user", "assistant"] * (1 + number % 3))]
        chats.append({"messages": turns, "q": turns[0]["content"], "a": turns[1]["content"]})
    return chats


SOURCES = {
    "chat": {"messages": {"style": "chat"}},
    "template": {"messages": {"style": "template", "template": TEMPLATE}},
    "chatml": {"messages": {"style": "template", "template": CHATML}},
    "joined": {"format": "{q}\nAnswer: {a}", "answers": ["a"]},
    "plain": {"format": "{q}\n{a}"},
}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("answers_prep")
    for number in range(3):  # a shard each, whose held-out documents are joined
        (folder / f"rows_{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()[number::3]))
    sources = [{"name": name, "paths": [str(folder / "*.jsonl")], **source} for name, source in SOURCES.items()]
    recipe = {
        "output": str(folder / "out"),
        "tokenizer": str(tokenizer_folder),
        "source": sources,
        "validation_fraction": 0.2,
        "shard_bytes": 3000,
        "workers": 1,
    }
    return prep.run(validate(recipe, PrepConfig, where="recipe"))


def expected(name: str, row: dict, tokenizer) -> tuple[list[int], list[bool]]:
    """A document's ids and answers, by pieces of text that are answers or not; a token is one if any of its characters is."""
    chats = row["messages"]
    if name == "chat":
        pieces = [(f"{turn['role'].capitalize()}: ", False, turn["content"], turn["role"] == "assistant") for turn in chats]
        flat = [part for head, _, text, answer in pieces for part in ((head, False), (text + "\n", answer))]
        flat[-1] = (flat[-1][0][:-1], flat[-1][1])
    elif name in ("template", "chatml"):
        gap = "\n" if name == "chatml" else ""
        flat = [part for turn in chats for part in ((f"<{turn['role']}>", False), (f"{turn['content']}<|end|>{gap}", turn["role"] == "assistant"))]
        flat[-1] = (flat[-1][0].rstrip(), True)
        rendered = tokenizer.apply_chat_template(chats, chat_template=SOURCES[name]["messages"]["template"], tokenize=False)
        assert "".join(part for part, _ in flat) + gap == rendered
    else:
        flat = [(f"{row['q']}\nAnswer: ", False), (row["a"], True)]
    text = "".join(part for part, _ in flat)
    marks = np.array([answer for part, answer in flat for _ in part])
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, bits = found["input_ids"], [bool(marks[begin:end].any()) for begin, end in found["offset_mapping"]]
    ends_itself = name in ("template", "chatml")
    return (ids, bits) if ends_itself else ([*ids, tokenizer.eos_token_id], [*bits, True])


def documents(manifest: Manifest) -> list[tuple[list[int], list[bool]]]:
    """Every document of a split with its answers."""
    reader, found = MaskReader(manifest), []
    lengths = iter(manifest.document_lengths().tolist())
    for number, (shard, prefix) in enumerate(zip(manifest.shards, manifest.prefixes, strict=True)):
        tokens, place = np.fromfile(f"{prefix}.bin", manifest.dtype), 0
        for _ in range(shard.documents):
            length = next(lengths)
            found.append((tokens[place : place + length].tolist(), reader.read(number, place, length).tolist()))
            place += length
    return found


@pytest.mark.parametrize("name", ["chat", "template", "chatml", "joined"])
def test_every_token_of_an_answer_is_marked_and_no_other(output, tokenizer_folder, name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.backend_tokenizer.no_truncation()
    source = {source.name: source for source in load_blend(output).sources}[name]
    assert source.validation is not None
    train, validation = (verify(folder, full=True) for folder in (source.train, source.validation))
    assert train.num_documents + validation.num_documents == COUNT and validation.num_documents > 5 and len(train.shards) == 3
    truth = sorted(expected(name, row, tokenizer) for row in rows())
    assert sorted(documents(train) + documents(validation)) == truth
    report = json.loads((output / name / "report.json").read_text())
    assert report["answer_tokens"] == train.num_answers == sum(sum(bits) for _, bits in documents(train))


def test_a_source_that_does_not_tell_has_no_masks(output):
    assert not list((output / "plain").rglob("*.mask"))
    assert verify(output / "plain" / "train").num_answers is None
    assert "answer_tokens" not in (output / "plain" / "train" / "manifest.json").read_text()
    assert json.loads((output / "plain" / "report.json").read_text())["answer_tokens"] is None


def test_answers_must_be_columns_of_the_format():
    for wrong in ({"format": "{q} {a}", "answers": ["b"]}, {"answers": ["a"]}, {"format": "{q} {a}", "answers": []}):
        with pytest.raises(UserError, match="must be columns of format="):
            validate({"output": "o", "tokenizer": "t", "source": [{"name": "s", "paths": ["x"], **wrong}]}, PrepConfig, where="recipe")
