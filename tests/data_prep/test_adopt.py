"""Shards that megatron-core's own builder wrote are adopted where they lie: the same tokens come out, and every kind of damage has a name."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import xxhash

from megatron_prism import artifact
from megatron_prism.config import validate
from megatron_prism.data_prep import shards
from megatron_prism.data_prep.adopt import flow, pair
from megatron_prism.data_prep.adopt.settings import AdoptConfig
from megatron_prism.data_prep.blend import load_blend
from megatron_prism.data_prep.held_out import held_out
from megatron_prism.data_prep.journal import Journal
from megatron_prism.data_prep.manifest import load_manifest, verify
from megatron_prism.data_prep.tokenizer import Tokenizer, prepare_tokenizer
from megatron_prism.errors import UserError
from megatron_prism.stages import adopt as stage

END = 0  # <|end|> in the tokenizer of conftest


def made_up(seed: int, count: int = 60) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [[*generator.integers(1, 300, generator.integers(1, 40)).tolist(), END] for _ in range(count)]


def build(prefix: Path, documents: list[list[int]], dtype: type = np.uint16, sentences: int = 1) -> Path:
    """A pair as Megatron-LM's preprocess_data.py writes it, through the builder that it uses."""
    warnings.simplefilter("ignore")
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for row in documents:
        lengths = [len(part) for part in np.array_split(row, sentences)] if row else []  # a text without tokens: no sequence
        builder.add_document(torch.tensor(row), lengths)
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture(scope="session")
def prepared(tokenizer_folder, tmp_path_factory):
    """What the process that loads the tokenizer leaves: it takes seconds, and is the same for every recipe here."""
    folder = tmp_path_factory.mktemp("prepared") / "tokenizer"
    return folder, prepare_tokenizer(tokenizer_folder, folder)


@pytest.fixture
def config(tmp_path, tokenizer_folder, prepared, monkeypatch):
    """A function from further keys to a recipe with one source of all pairs below `old`."""

    def prepare(source: Path, target: Path, end_of_document: str | None) -> Tokenizer:
        assert (source, end_of_document) == (tokenizer_folder, None)
        shutil.copytree(prepared[0], target, dirs_exist_ok=True)
        return prepared[1]

    monkeypatch.setattr(flow, "prepare_tokenizer", prepare)

    def make(**keys: object) -> AdoptConfig:
        source = [{"name": "old", "domain": "math", "paths": [str(tmp_path / "old")]}]
        base = {"output": str(tmp_path / "out"), "tokenizer": str(tokenizer_folder), "source": source, "workers": 2}
        return validate({**base, **keys}, AdoptConfig, where="test")

    return make


@pytest.fixture
def pairs(tmp_path):
    """Two pairs in nested folders, dots in their names; their documents in order."""
    documents = made_up(0), made_up(1)
    build(tmp_path / "old" / "a" / "web.v1_text_document", documents[0])
    build(tmp_path / "old" / "b.part_text_document", documents[1])
    return documents


def read_all(folder: Path) -> list[list[int]]:
    from megatron_prism.engine.data import SourceReader

    manifest = load_manifest(folder)
    reader = SourceReader(manifest)
    return [reader.read(place, 0, int(length)).tolist() for place, length in enumerate(manifest.document_lengths()) if length]


def test_adopted_documents_are_read_as_written_and_their_files_are_left_alone(tmp_path, config, pairs, monkeypatch):
    monkeypatch.setattr(pair, "CHUNK_BYTES", 64)  # many chunks: documents cross them
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "old").rglob("*.*")}
    out = stage.run(config())
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "old").rglob("*.*")}
    artifact.require(out, "prep")
    assert not list(out.rglob("*.bin")) and not (out / ".resume").exists()
    manifest = verify(out / "old" / "train", full=True)
    assert (manifest.num_documents, manifest.num_tokens) == (120, sum(map(len, pairs[0] + pairs[1])))
    first = tmp_path / "old" / "a" / "web.v1_text_document"
    assert manifest.shards[0].name == str(first) and manifest.shards[0].blocks == (xxhash.xxh3_64(Path(f"{first}.bin").read_bytes()).hexdigest(),)
    assert read_all(out / "old" / "train") == pairs[0] + pairs[1]
    report = json.loads((out / "old" / "report.json").read_text())
    assert (report["files"], report["without_end"], report["empty"]) == (2, 0, 0)
    assert report["largest_id"] == max(max(row) for row in pairs[0] + pairs[1])


def test_answers_of_adopted_shards_are_refused_by_name_with_the_way_to_have_them(config, pairs):
    from megatron_prism.data_prep import learnt

    blend = load_blend(stage.run(config()))
    with pytest.raises(
        UserError, match=r"the loss of old is to count answers alone, and adopted shards \(prism adopt\) have no answer masks.*prism prep"
    ):
        learnt.check(blend.sources, blend.manifests(), "answers")
    learnt.check(blend.sources, blend.manifests(), "all")


def test_an_adopted_source_trains_beside_a_prepared_validation_share(tmp_path, config, pairs):
    """Samples of both splits are the documents in the sampler's order, and no document is in both."""
    from megatron_prism.data_prep.document_order import document_order
    from megatron_prism.engine.data import SampleReader
    from megatron_prism.evals.tokens import TokenStream

    documents = pairs[0] + pairs[1]
    out = stage.run(config(validation_fraction=0.2, seed=5))
    held = held_out(5, "old", 0, 120, 0.2)
    assert 5 < held.sum() < 60
    blend = load_blend(out)
    train, validation = (load_manifest(out / "old" / split) for split in ("train", "validation"))
    assert (train.num_documents, validation.num_documents) == (120 - held.sum(), held.sum())
    assert train.num_tokens + validation.num_tokens == sum(map(len, documents))
    for split, mask in (("train", ~held), ("validation", held)):
        order = [place for place in document_order(120, 5, "old", 0) if mask[place]]
        stream = [token for place in order for token in documents[place]]
        samples = SampleReader(blend, split, seq_len=16, mask_end_of_document=True)
        for index in range((len(stream) - 1) // 16):
            assert samples.tokens(index)[0].tolist() == stream[16 * index : 16 * index + 17]
        batch = samples.micro_batch(range(2))
        assert (batch.loss_mask == (batch.tokens != END)).all()
    stream = TokenStream(validation)
    assert stream.read(0, len(stream)).tolist() == [token for place in np.flatnonzero(held) for token in documents[place]]


def test_validation_shards_of_their_own_and_relative_references_move_with_the_output(tmp_path, config, pairs):
    build(tmp_path / "moved" / "old" / "t", pairs[0])
    build(tmp_path / "moved" / "old" / "v", pairs[1])
    source = [{"name": "s", "paths": [str(tmp_path / "moved/old/t.bin")], "validation_paths": [str(tmp_path / "moved/old/v")]}]
    out = stage.run(config(source=source, output=str(tmp_path / "moved" / "out"), references="relative"))
    assert load_manifest(out / "s" / "train").shards[0].name == "../../../old/t"
    (tmp_path / "moved").rename(tmp_path / "elsewhere")
    blend = load_blend(tmp_path / "elsewhere" / "out")
    assert read_all(blend.sources[0].train) == pairs[0] and read_all(blend.sources[0].validation) == pairs[1]


def test_documents_without_tokens_or_without_an_end_are_counted_and_refused_on_request(tmp_path, config, monkeypatch):
    monkeypatch.setattr(pair, "CHUNK_BYTES", 8)
    build(tmp_path / "old" / "a", [[5, END], [6, 7], [], [8, END], [9]], dtype=np.int32)
    out = stage.run(config())
    report = json.loads((out / "old" / "report.json").read_text())
    assert (report["documents"], report["without_end"], report["first_without_end"]) == (4, 2, f"{tmp_path / 'old' / 'a'}, document 1")
    assert read_all(out / "old" / "train") == [[5, END], [6, 7], [8, END], [9]]
    with pytest.raises(UserError, match=r"a\.bin: document 1 does not end with the end-of-document id 0"):
        stage.run(config(output=str(tmp_path / "strict"), on_missing_end="refuse"))
    assert not artifact.is_complete(tmp_path / "strict")


def test_sequences_of_zero_tokens_keep_their_place(tmp_path, config):
    documents = [[5, END], [6, END], [7, END]]
    data = np.array([token for row in documents for token in row], np.uint16)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "a.bin").write_bytes(data.tobytes())
    (tmp_path / "old" / "a.idx").write_bytes(shards.index_bytes(np.array([0, 2, 0, 2, 2, 0]), np.uint16))
    out = stage.run(config())
    assert json.loads((out / "old" / "report.json").read_text())["empty"] == 3
    assert json.loads((out / "old" / "report.json").read_text())["without_end"] == 0
    assert read_all(out / "old" / "train") == documents


def test_sentences_are_documents_only_on_request(tmp_path, config):
    build(tmp_path / "old" / "a", [[1, 2, 3, END]], sentences=2)
    with pytest.raises(UserError, match=r"a\.idx: a document, number 0, packs several sequences .*sequences=documents"):
        stage.run(config())
    out = stage.run(config(sequences="documents"))
    assert read_all(out / "old" / "train") == [[1, 2], [3, END]]


def flip(path: Path, place: int, value: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] = value
    path.write_bytes(data)


def damage(old: Path, how: str) -> None:
    path = old / "b.part_text_document"
    content = Path(f"{path}.bin").read_bytes()
    if how == "cut":
        Path(f"{path}.bin").write_bytes(content[:-6])
    elif how == "swapped":
        (old / "a" / "web.v1_text_document.bin").replace(f"{path}.bin")
        (old / "a" / "web.v1_text_document.bin").write_bytes(content)
    elif how == "alone":
        Path(f"{path}.idx").unlink()
    elif how == "magic":
        flip(Path(f"{path}.idx"), 0, 0)
    elif how == "version":
        flip(Path(f"{path}.idx"), 9, 3)
    elif how == "index cut":
        Path(f"{path}.idx").write_bytes(Path(f"{path}.idx").read_bytes()[:-3])
    elif how == "gap":
        flip(Path(f"{path}.idx"), 34 + 4 * 60 + 8, 99)
    elif how == "foreign id":
        flip(Path(f"{path}.bin"), 11, 77)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("cut", r"b\.part_text_document\.bin has \d+ bytes, its index describes \d+: it was cut short"),
        ("swapped", r"\.bin has \d+ bytes, its index describes \d+: "),
        ("alone", r"b\.part_text_document\.bin has no b\.part_text_document\.idx beside it"),
        ("magic", r"b\.part_text_document\.idx is no index of token ids"),
        ("version", r"b\.part_text_document\.idx is of version 3"),
        ("index cut", r"b\.part_text_document\.idx has \d+ bytes, \d+ belong to its 60 sequences"),
        ("gap", r"b\.part_text_document\.idx: sequence 1 has .* at byte 99, where byte \d+ is expected"),
        ("foreign id", r"b\.part_text_document\.bin, document 0: token 5 of the file is id 19\d\d\d, the tokenizer has ids 0 to 499"),
    ],
)
def test_damaged_pairs_are_named(tmp_path, config, pairs, how, words):
    damage(tmp_path / "old", how)
    with pytest.raises(UserError, match=words):
        stage.run(config())
    assert not artifact.is_complete(tmp_path / "out")


def test_a_bit_that_flips_after_adoption_is_found_when_it_is_read(tmp_path, config, pairs):
    out = stage.run(config())
    flip(tmp_path / "old" / "b.part_text_document.bin", 100, 3)
    verify(out / "old" / "train")
    with pytest.raises(UserError, match=r"b\.part_text_document\.bin, block 0 "):
        read_all(out / "old" / "train")
    with pytest.raises(UserError, match=r"made from other shards: .*b\.part_text_document\.bin changed"):
        stage.run(config())


def test_a_killed_run_reads_only_the_files_that_are_left_and_ends_the_same(tmp_path, config, pairs, monkeypatch):
    whole = stage.run(config(output=str(tmp_path / "whole")))
    read, real = [], flow.scan

    def dying(prefix, *rest):
        if read:
            raise KeyboardInterrupt
        read.append(prefix)
        return real(prefix, *rest)

    monkeypatch.setattr(flow, "scan", dying)
    with pytest.raises(KeyboardInterrupt):
        stage.run(config(workers=1))
    with (Journal(tmp_path / "out").folder / "pairs.jsonl.tmp").open("ab") as file:
        file.write(b'{"prefix": "cut by a cra')
    again = []
    monkeypatch.setattr(flow, "scan", lambda prefix, *rest: again.append(prefix) or real(prefix, *rest))
    with pytest.raises(UserError, match=r"unfinished prep of something else: recipe\.seed was 1234, now 9"):
        stage.run(config(seed=9))
    out = stage.run(config())
    assert len(read) == len(again) == 1 and read != again
    for name in ("old/train/manifest.json", "old/report.json", "blend.toml"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"source": [{"name": "s", "paths": ["nowhere/*.bin"]}]}, "matches no .bin or .idx"),
        ({"source": [{"name": "s", "paths": ["{}/old"], "validation_paths": ["{}/old/a"]}]}, "is train of 's' and validation of 's'"),
        (
            {"source": [{"name": "s", "paths": ["{}/old"], "validation_paths": ["x"]}], "validation_fraction": 0.1},
            r"but \['s'\] have validation_paths",
        ),
        ({"source": [{"name": "s", "paths": ["{}/old"]}, {"name": "t", "weight": 1, "paths": ["x"]}]}, "every source a weight"),
        ({"sequences": "documents", "validation_fraction": 0.1}, "would hold out single sentences"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(tmp_path, config, pairs, keys, words):
    with pytest.raises(UserError, match=words):
        stage.run(config(**json.loads(json.dumps(keys).replace("{}", str(tmp_path)))))


def test_shards_of_two_dtypes_need_two_sources(tmp_path, config, pairs):
    build(tmp_path / "old" / "c", pairs[0], dtype=np.int32)
    with pytest.raises(UserError, match="has train shards of int32 and uint16; make a source of each"):
        stage.run(config())
