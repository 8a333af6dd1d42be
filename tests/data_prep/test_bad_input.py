"""Bad input through all of prep: named, counted or refused, as the recipe says; what was finished stays, and nothing is lost."""

import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from prep_cases import output_bytes, read_split, texts, write_kind

from megatron_prism.data_prep import prepare, tokenizer
from megatron_prism.data_prep.parts import Place
from megatron_prism.data_prep.settings import PrepConfig, SourceConfig
from megatron_prism.errors import UserError
from megatron_prism.stages import prep


@pytest.fixture(scope="module", autouse=True)
def tokenizer_in_this_process():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "prepare_tokenizer", tokenizer._prepare)
        yield


@pytest.fixture
def recipe(tokenizer_folder, tmp_path):
    """A prep of these files, of two parts."""

    def make(paths, **more):
        given = {"output": tmp_path / "out", "tokenizer": tokenizer_folder, "shard_bytes": 20_000, "workers": 1, **more}
        return PrepConfig(source=[SourceConfig(name="s", paths=[str(path) for path in paths])], **given)

    return make


def test_malformed_text_and_nul_bytes_are_counted_or_refused_as_configured(recipe, tmp_path):
    good = [json.dumps({"text": f"document {number}"}).encode() for number in range(6)]
    lines = [*good[:3], b'{"text": "\xff\xfe"}', b"\0" * 512, *good[3:], b"\0\0"]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines)))
    (tmp_path / "c.txt").write_bytes(b"half of a file\0\0\0\0")
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "c.txt")]
    (report,) = prepare.prepare(recipe(paths)).sources
    assert (report.documents, report.records, report.bad) == (12, 19, {"NUL bytes": 5, "invalid UTF-8": 2})
    written = json.loads((tmp_path / "out" / "s" / "report.json").read_text())["bad_samples"]
    assert [(Path(each["file"]).name, each["line"]) for each in written] == [
        *(("a.jsonl", n) for n in (4, 5, 9)),
        *(("b.jsonl.gz", n) for n in (4, 5, 9)),
        ("c.txt", 1),
    ]
    with pytest.raises(UserError, match=r"a\.jsonl, record 4: invalid UTF-8"):
        prepare.prepare(recipe(paths, output=tmp_path / "strict", on_bad="refuse"))


@pytest.mark.parametrize("name", ["b.jsonl.gz", "b.txt.gz"])
def test_a_half_written_archive_stops_the_run_by_name_and_its_whole_form_is_another_input(recipe, tmp_path, name):
    write_kind(tmp_path / "in", "jsonl", texts(100))
    data = gzip.compress(("\n".join(json.dumps({"text": text}) for text in texts(300))).encode())
    (tmp_path / "in" / name).write_bytes(data[: len(data) // 2])
    config = recipe([tmp_path / "in"])
    with pytest.raises(UserError, match=rf"{name} cannot be decompressed .* damaged or was cut short; fetch it again"):
        prepare.prepare(config)
    assert not (config.output / "COMPLETE").exists()
    (tmp_path / "in" / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}\.bytes was {len(data) // 2}, now {len(data)}"):
        prepare.prepare(config)


@pytest.mark.parametrize("drift", ["renamed", "retyped", "cut"])
def test_a_table_that_drifted_is_named_before_anything_is_written(recipe, tmp_path, drift):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "in").mkdir()
    for number in range(30):
        pq.write_table(pa.table({"text": texts(5, number), "extra": list(range(5))}), tmp_path / "in" / f"{number:02d}.parquet")
    last = tmp_path / "in" / "29.parquet"
    if drift == "cut":
        last.write_bytes(last.read_bytes()[:-100])
    else:
        table = {"content": texts(5)} if drift == "renamed" else {"text": [1.5] * 5}
        pq.write_table(pa.table(table), last)
    words = {
        "renamed": "has no column 'text'; it has content",
        "retyped": "column 'text' holds double, not text",
        "cut": "is no readable parquet file",
    }
    with pytest.raises(UserError, match=rf"29\.parquet:? {words[drift]}"):
        prepare.prepare(recipe([tmp_path / "in"]))
    assert not (tmp_path / "out").exists()


def test_columns_that_only_the_recipe_does_not_need_may_drift(recipe, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = [{"text": ["one"], "id": [1]}, {"id": ["x"], "text": pa.array(["two"], pa.large_string())}, {"text": ["three", None]}]
    for number, table in enumerate(tables):
        pq.write_table(pa.table(table), tmp_path / f"{number}.parquet")
    (report,) = prepare.prepare(recipe([tmp_path / "*.parquet"])).sources
    assert (report.documents, report.bad) == (3, {"column 'text' is null, not text": 1})


def changed_copy(folder, target):
    """A tokenizer with two of its ids exchanged."""
    shutil.copytree(folder, target)
    content = json.loads((target / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (target / "tokenizer.json").write_text(json.dumps(content))
    return target


def test_a_tokenizer_that_changed_under_the_shards_is_refused_before_and_after_the_end(recipe, tokenizer_folder, tmp_path):
    place, other = shutil.copytree(tokenizer_folder, tmp_path / "tokenizer"), changed_copy(tokenizer_folder, tmp_path / "other")
    write_kind(tmp_path / "in", "jsonl", texts(50))
    config = recipe([tmp_path / "in"], tokenizer=place)
    prepare.prepare(config)  # without `finish`: as if killed just before the end
    shutil.copy(other / "tokenizer.json", place / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer\.hash was"):
        prepare.prepare(config)
    shutil.copy(tokenizer_folder / "tokenizer.json", place / "tokenizer.json")
    prep.run(config)
    prep.run(config)  # nothing to do
    shutil.copy(other / "tokenizer.json", place / "tokenizer.json")
    with pytest.raises(UserError, match=rf"made from other inputs: {place} changed"):
        prep.run(config)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_finished_shard_that_was_damaged_before_the_end_is_refused(recipe, tmp_path, damage):
    write_kind(tmp_path / "in", "jsonl", texts(100))
    config = recipe([tmp_path / "in"], validation_fraction=0.2)
    prepare.prepare(config)
    shard = sorted((config.output / "s" / "train").glob("*.bin"))[1]
    shard.write_bytes(shard.read_bytes()[:-2]) if damage == "cut" else shard.unlink()
    with pytest.raises(UserError, match=rf"{shard.name} (is missing|has \d+ bytes), its manifest says"):
        prepare.prepare(config)


def test_a_shard_of_another_process_that_was_cut_is_refused_by_the_one_that_joins(recipe, tmp_path):
    write_kind(tmp_path / "in", "jsonl", texts(100))
    config = recipe([tmp_path / "in"])
    assert prepare.prepare(config, Place(0, 2)).missing == 1
    (shard,) = (config.output / "s" / "train").glob("*.bin")
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(UserError, match=rf"{shard.name} has \d+ bytes, its manifest says"):
        prepare.prepare(config, Place(1, 2))


def test_an_output_inside_what_is_read_and_names_of_what_else_lies_there_are_refused(recipe, tmp_path):
    write_kind(tmp_path / "in", "jsonl", texts(5))
    for output in (tmp_path / "in" / "out", tmp_path / "in"):
        with pytest.raises(UserError, match=r"lies inside .*in of source 's', which would read it"):
            prepare.prepare(recipe([tmp_path / "in"], output=output))
    assert prepare.prepare(recipe([tmp_path / "in" / "*.jsonl"], output=tmp_path / "in" / "out")).sources
    for name in ("Complete", "blend.toml", "tokenizer"):
        with pytest.raises(ValueError, match="becomes a folder"):
            SourceConfig(name=name, paths=["x"])


def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(tokenizer_folder, tmp_path):
    """The limit is the kernel's: a write beyond it fails in the middle of a shard, as on a full disk."""
    write_kind(tmp_path / "in", "gz", texts(800))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'output = "x"\ntokenizer = "{tokenizer_folder}"\nworkers = 1\n[[source]]\nname = "s"\npaths = ["{tmp_path / "in"}"]\n')

    def start(output, limit=None):
        def limited():
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        command = [sys.executable, "-m", "megatron_prism", "prep", str(recipe), f"output={tmp_path / output}"]
        env = {**os.environ, "PYTHONSAFEPATH": "1"}
        return subprocess.run(command, env=env, capture_output=True, text=True, preexec_fn=limited if limit else None, check=False, timeout=250)

    full = start("out", 300_000)
    assert full.returncode == 2 and "make room and run the same command again" in full.stderr, full.stderr
    assert not (tmp_path / "out" / "COMPLETE").exists()
    for output in ("out", "whole"):
        done = start(output)
        assert done.returncode == 0, done.stderr
    assert output_bytes(tmp_path / "out") == output_bytes(tmp_path / "whole")
    assert len(read_split(tmp_path / "out" / "s" / "train")) == 800
