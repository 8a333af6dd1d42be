"""Inputs are cut the same way whoever cuts them and wherever a run starts again."""

import itertools
import json
from pathlib import Path

import pytest
from prep_cases import KINDS, texts, write_kind

from megatron_prism.config import validate
from megatron_prism.data_prep import inputs
from megatron_prism.data_prep.documents import Extract, Oversized, read_chunk
from megatron_prism.data_prep.settings import SourceConfig
from megatron_prism.data_prep.sources.recipe import SampleConfig
from megatron_prism.errors import UserError

EXTRACT = Extract("text", None, 5)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 5000)
    monkeypatch.setattr(inputs, "PARQUET_BATCH_ROWS", 10)


def source_of(folder, kind, documents, **more):
    place = write_kind(folder, kind, documents)
    given = {"function": place, "arguments": {"path": str(folder / "data.json")}} if kind == "function" else {"paths": [place]}
    return SourceConfig(name="s", **given, **more)


def documents_of(chunks):
    return [text for chunk in chunks for text in read_chunk(chunk.kind, chunk.payload, EXTRACT).texts]


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_hold_every_document_once_in_order(tmp_path, kind):
    documents = texts(120)
    source = source_of(tmp_path / kind, kind, documents)
    chunks = list(inputs.chunks(source, inputs.find_inputs(source)))
    assert documents_of(chunks) == documents
    assert len(chunks) > 5
    assert all(before.end == after.start for before, after in itertools.pairwise(chunks))
    found = inputs.find_inputs(source)
    assert chunks[-1].end == inputs.Position(len(found), 0)
    if kind not in ("function", "zst", "gz"):
        assert sum(chunk.input_bytes for chunk in chunks) == sum(file.bytes for file in found)


@pytest.mark.parametrize("kind", KINDS)
def test_going_on_from_any_boundary_gives_the_same_chunks(tmp_path, kind):
    source = source_of(tmp_path / kind, kind, texts(80))
    found = inputs.find_inputs(source)
    whole = list(inputs.chunks(source, found))
    for number, chunk in enumerate(whole):
        rest = list(inputs.chunks(source, found, chunk.end, chunk.digest))
        assert [part._replace(input_bytes=0) for part in rest] == [part._replace(input_bytes=0) for part in whole[number + 1 :]]


def test_paragraphs_of_a_long_file_are_whole_in_every_chunk(tmp_path):
    paragraphs = [f"{number} " + "word " * (number % 50) + "\nsecond line" for number in range(300)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    source = SourceConfig(name="s", paths=[str(tmp_path)], documents="paragraph")
    chunks = list(inputs.chunks(source, inputs.find_inputs(source)))
    assert len(chunks) > 5
    assert documents_of(chunks) == paragraphs


def test_one_source_may_hold_files_of_several_kinds(tmp_path):
    first, second = texts(30, 1), texts(30, 2)
    places = [write_kind(tmp_path / "a", "text", first), write_kind(tmp_path / "b", "parquet", second)]
    source = SourceConfig(name="s", paths=places)
    assert documents_of(inputs.chunks(source, inputs.find_inputs(source))) == first + second


def test_a_function_that_yields_something_else_on_resuming_is_refused(tmp_path):
    documents = texts(80)
    source = source_of(tmp_path, "function", documents)
    found = inputs.find_inputs(source)
    middle = list(inputs.chunks(source, found))[2]
    write_kind(tmp_path, "function", ["changed", *documents[1:]])
    with pytest.raises(UserError, match="must yield the same each time"):
        list(inputs.chunks(source, found, middle.end, middle.digest))
    write_kind(tmp_path, "function", documents[:3])
    with pytest.raises(UserError, match="must yield the same each time"):
        list(inputs.chunks(source, found, middle.end, middle.digest))


def test_fingerprints_tell_changed_files_apart(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(300_000))
    before = inputs.fingerprint(path)
    for place in (0, 150_000, 299_999):
        data = bytearray(300_000)
        data[place] = 1
        path.write_bytes(data)
        assert inputs.fingerprint(path) != before
    path.write_bytes(bytes(300_001))
    assert inputs.fingerprint(path) != before


def test_patterns_are_taken_in_order_files_sorted_and_none_twice(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", "notes.xyz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    source = SourceConfig(name="s", paths=[str(tmp_path / "sub/*.jsonl"), str(tmp_path / "**/*.jsonl"), str(tmp_path)])
    assert [file.path.removeprefix(f"{tmp_path}/") for file in inputs.find_inputs(source)] == ["sub/c.jsonl", "a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"paths": ["nowhere/*.jsonl"]}, "matches no file"),
        ({"paths": [__file__]}, "no known suffix"),
        ({"function": "no.such.module:f"}, "cannot be loaded.*path/to/file.py:function.*PYTHONPATH=. prism"),
        ({"function": "json:nothing"}, "cannot be loaded"),
        ({"function": "json"}, "must read package.module:function"),
        ({"function": "missing.py:f"}, "cannot be loaded"),
    ],
)
def test_inputs_that_are_not_there_are_refused_by_name(given, words):
    with pytest.raises(UserError, match=words):
        inputs.find_inputs(SourceConfig(name="s", **given))


@pytest.mark.parametrize("with_sample", [False, True])
def test_small_and_empty_files_share_chunks_and_keep_their_places(tmp_path, monkeypatch, with_sample):
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 2000)
    sizes = [3, 0, 1, 90, 0, 2, *[1] * 40, 0]
    for number, size in enumerate(sizes):
        lines = [json.dumps({"text": f"document {number}.{line} of a file", "id": f"{number}.{line}"}) for line in range(size)]
        (tmp_path / f"{number:03d}.jsonl").write_text("\n".join([*lines, "{broken"] if number == 5 else lines))
    sample = {"sample": SampleConfig(count=10_000)} if with_sample else {}
    source = SourceConfig(name="s", paths=[str(tmp_path)], **sample)
    found = inputs.find_inputs(source)
    chunks = list(inputs.chunks(source, found))
    assert (len(chunks) < 12) != with_sample
    assert all(before.end == after.start for before, after in itertools.pairwise(chunks)) and chunks[-1].end == inputs.Position(len(found), 0)
    read = [read_chunk(chunk.kind, chunk.payload, EXTRACT) for chunk in chunks]
    assert [text for each in read for text in each.texts] == [
        f"document {n}.{line} of a file" for n, size in enumerate(sizes) for line in range(size)
    ]
    ((chunk, bad),) = [(chunk, each.bad[0]) for chunk, each in zip(chunks, read, strict=True) if each.bad]
    assert (chunk.start.input + bad.input, bad.line) == (5, 3)
    for number, chunk in enumerate(chunks):
        assert list(inputs.chunks(source, found, chunk.end)) == chunks[number + 1 :]


@pytest.mark.parametrize("kind", ["gz", "zst", "jsonl", "parquet", "function", "paragraphs", "text"])
def test_a_record_beyond_the_limit_costs_itself_alone(tmp_path, kind):
    documents = texts(60)
    documents[20], documents[40] = "y" * 300_000, "z z " * 20_000
    if kind == "paragraphs":
        documents = [text.replace("\n", " ") for text in documents]
        (tmp_path / "book.txt").write_text("\n\n".join(documents))
        source = SourceConfig(name="s", paths=[str(tmp_path)], documents="paragraph", max_record_bytes=50_000)
    else:
        source = source_of(tmp_path / kind, kind, documents, max_record_bytes=50_000)
    found = inputs.find_inputs(source)
    chunks = list(inputs.chunks(source, found))
    read = [read_chunk(chunk.kind, chunk.payload, EXTRACT._replace(max_record_bytes=50_000)) for chunk in chunks]
    kept = [text for number, text in enumerate(documents) if number not in (20, 40)]
    assert [text.strip() for each in read for text in each.texts] == [text.strip() for text in kept]
    assert sum(each.reasons["more than 50,000 bytes (max_record_bytes)"] for each in read) == 2
    assert all(before.end == after.start for before, after in itertools.pairwise(chunks)) and chunks[-1].end == inputs.Position(len(found), 0)
    for number in (1, len(chunks) // 2):
        rest = list(inputs.chunks(source, found, chunks[number].end, chunks[number].digest))
        assert [part._replace(input_bytes=0) for part in rest] == [part._replace(input_bytes=0) for part in chunks[number + 1 :]]


def test_the_limit_counts_bytes_where_a_character_has_several(tmp_path):
    """Of texts, of columns, and of the turns of a chat; what counts in characters keeps all but the last."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "make.py").write_text(
        "def texts():\n    yield from ['\u4e2d' * 300, 'a' * 900, '\u4e2d' * 334, '\u4e2d' * 333]\n"
        "def rows():\n    yield from ({'q': '\u00fc' * 100, 'a': text, 'n': 7} for text in ['a' * 800, 'a' * 801])\n"
    )
    turns = [[{"role": "user", "content": "\u4e2d" * count}] for count in (330, 340)]
    pq.write_table(pa.table({"messages": turns}), tmp_path / "chat.parquet")
    given = {
        "texts": ({"function": f"{tmp_path / 'make.py'}:texts"}, [0, 0, 1, 0]),
        "rows": ({"function": f"{tmp_path / 'make.py'}:rows"}, [0, 1]),
        "chat": ({"paths": [str(tmp_path / "chat.parquet")], "messages": {"style": "chat"}}, [0, 1]),
    }
    for name, (keys, too_long) in given.items():
        source = validate({"name": name, "max_record_bytes": 1000, **keys}, SourceConfig, where="test")
        records = [record for chunk in inputs.chunks(source, inputs.find_inputs(source)) for record in chunk.payload]
        assert [isinstance(record, Oversized) for record in records] == too_long, name


def test_a_table_that_is_damaged_inside_is_named(tmp_path):
    import pyarrow.parquet as pq

    path = Path(write_kind(tmp_path, "parquet", texts(150)))
    data, start = bytearray(path.read_bytes()), pq.ParquetFile(path).metadata.row_group(2).column(1).dictionary_page_offset
    data[start : start + 500] = b"\xff" * 500  # the footer, which is checked before a run, is whole
    path.write_bytes(data)
    source = SourceConfig(name="s", paths=[str(path)])
    inputs.check_tables(source, found := inputs.find_inputs(source))
    with pytest.raises(UserError, match=r"a\.parquet cannot be read in row group 2 \(.*it is damaged, or was changed; fetch it again"):
        list(inputs.chunks(source, found))


def test_parquet_without_the_column_or_with_numbers_in_it_is_refused(tmp_path):
    path = write_kind(tmp_path, "parquet", texts(5))
    for column, words in (("missing", "has no column 'missing'; it has id, text"), ("id", "holds int64, not text")):
        source = SourceConfig(name="s", paths=[path], column=column)
        with pytest.raises(UserError, match=words):
            list(inputs.chunks(source, inputs.find_inputs(source)))


def test_parquet_columns_join_by_format_and_nulls_are_bad(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"q": ["a", None, "c"], "a": ["1", "2", "3"]}), tmp_path / "x.parquet")
    source = SourceConfig(name="s", paths=[str(tmp_path)], format="{q}\n{a}")
    (chunk,) = inputs.chunks(source, inputs.find_inputs(source))
    found = read_chunk(chunk.kind, chunk.payload, Extract("text", source.format, 5))
    assert found.texts == ["a\n1", "c\n3"]
    assert found.reasons == {"column 'q' is null, not text": 1}
