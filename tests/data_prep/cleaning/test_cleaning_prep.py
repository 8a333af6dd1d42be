"""Cleaning inside `prism prep`: real files of every kind, counted by rule, the same bytes for any number of workers and after kills."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from prep_cases import output_bytes, read_split, texts, write_kind

from megatron_prism.config import load_recipe, to_toml
from megatron_prism.data_prep import inputs, prepare, tokenizer
from megatron_prism.data_prep.cleaning.ngrams import ngram_of, write_ngrams
from megatron_prism.data_prep.cleaning.prepass import PrePass
from megatron_prism.data_prep.cleaning.words import words
from megatron_prism.data_prep.settings import PrepConfig
from megatron_prism.data_prep.source_writer import SourceWriter
from megatron_prism.data_prep.tokenizer import load_auto
from megatron_prism.errors import UserError
from megatron_prism.stages import prep

QUESTION = "How many crates of oranges does Maria have left after she sells half of them on each of three days?"
KINDS = ("jsonl", "gz", "parquet", "text")


@pytest.fixture(scope="module", autouse=True)
def tokenizer_in_this_process():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "prepare_tokenizer", tokenizer._prepare)
        yield


def sentences(count, seed):
    """Documents of 60 to 120 words of a large vocabulary: no two are near by chance."""
    generator = np.random.default_rng(seed)
    return [" ".join(f"w{number}" for number in generator.integers(0, 10**6, generator.integers(60, 120))) for _ in range(count)]


def plant(documents, other, source, generator):
    """Documents with, at known places, copies, near copies and questions in them; (texts, the truth by kind)."""
    made = list(documents)
    truth = {"exact": [], "near": [], "contaminated": [], "short": []}
    places = generator.permutation(np.arange(60, len(made)))[:40]
    for number, place in enumerate(places.tolist()):
        kind = ("exact", "near", "contaminated", "short")[number % 4]
        original = (other if number % 8 < 4 else made)[number]  # of this source, or of one before
        changed = original.split()
        changed[0] = f"changed-{source}"
        replaced = {"exact": f" {original.replace(' ', '  ', 3)}\n", "near": " ".join(changed), "contaminated": f"{made[place]}\n{QUESTION}"}
        made[place] = replaced.get(kind, "too short")
        truth[kind].append(place)
    return made, truth


def write_question(folder):
    folder.mkdir(parents=True)
    own = words(QUESTION)
    lines = [ngram_of("oranges/0", own[i : i + 13]) for i in range(len(own) - 12)]
    write_ngrams(folder / "oranges.jsonl", "oranges", 13, 1, lines)
    return folder


@pytest.fixture(scope="module")
def planted(tokenizer_folder, tmp_path_factory):
    """Sources of every kind, the truth of each, and a recipe over all of them with everything on."""
    folder, generator = tmp_path_factory.mktemp("planted"), np.random.default_rng(7)
    documents, truth, other, blocks = {}, {}, sentences(60, 99), []
    for seed, kind in enumerate(KINDS):
        documents[kind], truth[kind] = plant(sentences(150, seed), other, kind, generator)
        blocks.append(f'[[source]]\nname = "{kind}"\npath = "{write_kind(folder / kind, kind, documents[kind])}"\n')
    (folder / "first.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in other))
    recipe = folder / "recipe.toml"
    ngrams = write_question(folder / "ngrams")
    recipe.write_text(
        f'output = "{folder / "out"}"\ntokenizer = "{tokenizer_folder}"\nvalidation_fraction = 0.05\nshard_bytes = 30_000\nworkers = 2\n'
        f'[cleaning]\nexact_duplicates = true\nnear_duplicates = {{}}\nfilters = {{min_words = 10}}\ncontamination = {{ngrams = ["{ngrams}"]}}\n'
        f'[[source]]\nname = "first"\npath = "{folder / "first.jsonl"}"\n' + "".join(blocks)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "CHUNK_BYTES", 8_000)
        yield recipe, documents, truth


def run(recipe, *overrides):
    config = load_recipe(recipe, overrides, PrepConfig)
    result = prepare.prepare(config)
    prepare.finish(config)
    return config, result


@pytest.fixture(scope="module")
def cleaned(planted):
    return run(planted[0])


def test_exactly_what_was_planted_is_dropped_and_everything_read_is_counted(planted, cleaned):
    _, documents, truth = planted
    config, result = cleaned
    loaded = load_auto(config.output / "tokenizer")
    for report in result.sources[1:]:
        mine = truth[report.name]
        assert report.dropped == {
            "fewer than 10 words": len(mine["short"]),
            "exact duplicate": len(mine["exact"]),
            "near duplicate (similarity >= 0.8)": len(mine["near"]),
            "contaminated: oranges": len(mine["contaminated"]),
        }
        kept = report.documents + report.held_out_documents
        assert kept + report.empty + sum(report.bad.values()) + sum(report.dropped.values()) == report.records == 150
        gone = {place for places in mine.values() for place in places}
        expected = [loaded(text)["input_ids"] for place, text in enumerate(documents[report.name]) if place not in gone]
        found = read_split(config.output / report.name / "train") + read_split(config.output / report.name / "validation")
        assert sorted(ids[:-1] for ids in found) == sorted(expected)


@pytest.mark.parametrize(("name", "reason"), [("again", r"\(60 exact duplicate\); duplicates count"), ("nothing", "no record is a document")])
def test_a_source_of_which_cleaning_leaves_nothing_is_refused_before_anything_is_tokenised(planted, tmp_path, name, reason):
    first = planted[0].parent / "first.jsonl"
    (tmp_path / "again.jsonl").write_text("".join(reversed(first.read_text().splitlines(keepends=True))))
    (tmp_path / "nothing.jsonl").write_text('{"other": 1}\n')
    settings = {"tokenizer": tomllib.loads(planted[0].read_text())["tokenizer"], "workers": 1, "cleaning": {"exact_duplicates": True}}
    sources = [{"name": path.stem, "path": str(path)} for path in (first, tmp_path / f"{name}.jsonl")]
    (recipe := tmp_path / "recipe.toml").write_text(tomli_w.dumps({"output": str(tmp_path / "out"), **settings, "source": sources}))
    for _ in range(2):  # the second run finds the pre-pass done, and says it again
        with pytest.raises(UserError, match=f"source '{name}': cleaning leaves no document of it .*{reason}"):
            run(recipe)
    assert (tmp_path / "out" / "cleaning.json").is_file() and not list((tmp_path / "out").glob("*/train"))


def test_reports_say_what_was_cut_and_why_with_place_and_excerpt(planted, cleaned):
    recipe, _, truth = planted
    config, _ = cleaned
    content = json.loads((config.output / "cleaning.json").read_text())
    assert list(content["ngrams"]) == [str(recipe.parent / "ngrams" / "oranges.jsonl")]
    for kind in KINDS:
        lines = [json.loads(line) for line in (config.output / kind / "contaminated.jsonl").read_text().splitlines()]
        assert {(line["task"], line["question"], line["action"], line["matches"]) for line in lines} == {("oranges", "oranges/0", "drop", 8)}
        assert all("Maria" in line["excerpt"] and line["ngram"].startswith("how many crates") for line in lines)
        figures = content["sources"][kind]
        assert figures["contamination"] == {"oranges": {"drop": 10, "cut": 0}}
        rules = ("kept", "exact duplicate", "near duplicate (similarity >= 0.8)", "contaminated: oranges")
        assert figures["candidates"] == sum(figures[rule] for rule in rules) == 140
        exact = [sample for sample in figures["duplicates"] if sample["rule"] == "exact"]
        assert len(exact) == 10 and {sample["of"]["source"] for sample in exact} == {"first", kind}
        assert all(sample["source"] == kind and sample["line"] >= 1 and Path(sample["file"]).is_file() for sample in exact)
    places = {json.loads(line)["line"] for line in (config.output / "parquet" / "contaminated.jsonl").read_text().splitlines()}
    assert places == {place + 1 for place in truth["parquet"]["contaminated"]}


def test_bytes_do_not_depend_on_workers_memory_and_where_a_run_stopped(planted, cleaned, tmp_path, monkeypatch):
    overrides = (f"output={tmp_path / 'out'}", "workers=1", "cleaning.memory_gib=0.00005")
    close = SourceWriter._close_unit

    def stop(writer):
        if writer.source.name == "gz" and writer.progress.units:
            raise KeyboardInterrupt
        close(writer)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SourceWriter, "_close_unit", stop)
        run(planted[0], *overrides)
    assert (tmp_path / "out" / ".resume" / "cleaning" / "result.json.tmp").is_file()
    monkeypatch.setattr(PrePass, "run", None)  # it is done: its result is read, not made again
    config, _ = run(planted[0], *overrides)
    assert output_bytes(config.output) == output_bytes(cleaned[0].output)
    assert not list(config.output.rglob("*.tmp")) and not (config.output / ".resume").exists()


def test_cut_keeps_the_rest_of_the_document(planted, tmp_path):
    config, result = run(planted[0], f"output={tmp_path / 'out'}", "cleaning.contamination.action=cut", "workers=1")
    loaded = load_auto(config.output / "tokenizer")
    (report,) = [report for report in result.sources if report.name == "parquet"]
    assert "contaminated: oranges" not in report.dropped
    found = [
        loaded.decode(ids[:-1]) for ids in read_split(config.output / "parquet" / "train") + read_split(config.output / "parquet" / "validation")
    ]
    _, documents, truth = planted
    cut = {documents["parquet"][place].replace(QUESTION, "?") for place in truth["parquet"]["contaminated"]}
    assert cut <= set(found) and not any("crates" in text for text in found)
    assert json.loads((config.output / "cleaning.json").read_text())["sources"]["parquet"]["contamination"] == {"oranges": {"drop": 0, "cut": 10}}


def test_a_source_has_filters_of_its_own_in_place_of_the_common_ones(tokenizer_folder, tmp_path):
    for name in ("a", "b", "c"):
        write_kind(tmp_path / name, "jsonl", ["one two three four five", "short one", "x"])
    table = {"a": "", "b": "filters = {}", "c": "filters = {max_words = 2}"}
    blocks = "".join(f'[[source]]\nname = "{name}"\npath = "{tmp_path / name}"\n{line}\n' for name, line in table.items())
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'output = "{tmp_path / "out"}"\ntokenizer = "{tokenizer_folder}"\nworkers = 1\n[cleaning.filters]\nmin_words = 2\n{blocks}')
    config, result = run(recipe)
    assert [report.dropped for report in result.sources] == [{"fewer than 2 words": 1}, {}, {"more than 2 words": 1}]
    assert not (config.output / "cleaning.json").exists()  # filters alone need no pass over everything
    (tmp_path / "again.toml").write_text(to_toml(config))
    assert load_recipe(tmp_path / "again.toml", ["workers=1"], PrepConfig) == config


def test_everything_is_off_by_default_and_settings_are_part_of_what_the_output_is(planted, cleaned, tmp_path):
    recipe = tomllib.loads(planted[0].read_text())
    del recipe["cleaning"]
    assert PrepConfig.model_validate_json(json.dumps(recipe)).cleaning is None
    prep.run(cleaned[0])  # a finished output of the same recipe and files is left as it is
    other = load_recipe(planted[0], ["cleaning.near_duplicates.threshold=0.9"], PrepConfig)
    with pytest.raises(UserError, match=r"cleaning\.near_duplicates\.threshold was 0\.8, now 0\.9"):
        prep.run(other)
    file = planted[0].parent / "ngrams" / "oranges.jsonl"
    before = file.read_text()
    try:
        file.write_text(before.replace("oranges/0", "oranges/1"))
        with pytest.raises(UserError, match=r"other inputs: .*oranges\.jsonl changed"):
            prep.run(cleaned[0])
    finally:
        file.write_text(before)
    with pytest.raises(UserError, match="no n-gram file"):
        run(planted[0], f"output={tmp_path / 'out'}", f'cleaning.contamination.ngrams=["{tmp_path / "missing.jsonl"}"]')


def test_a_result_that_changed_before_tokenising_is_refused(planted, tmp_path):
    config = load_recipe(planted[0], [f"output={tmp_path / 'out'}", "workers=1"], PrepConfig)
    prepare.prepare(config)  # without `finish`: as if killed just before the end
    path = config.output / ".resume" / "cleaning" / "gz" / "verdict.tmp"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(UserError, match="differs from its checksum: the result of cleaning was changed"):
        prepare.prepare(config)


PRE_PASS = """
import sys
from pathlib import Path
from megatron_prism.config import load_recipe
from megatron_prism.data_prep import inputs, prepare
from megatron_prism.data_prep.cleaning.prepass import Cleaner
inputs.CHUNK_BYTES = 30_000
config = load_recipe(Path(sys.argv[1]), [f"output={sys.argv[2]}"], prepare.PrepConfig)
Cleaner(config, prepare.find_all_inputs(config)).run(1)
"""


def test_a_pre_pass_killed_at_any_unit_goes_on_and_ends_as_the_unbroken_one(tmp_path):
    place = write_kind(tmp_path / "in", "gz", [*texts(700), *texts(700, seed=1), *texts(600)])
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'output = "x"\ntokenizer = "unused"\nshard_bytes = 50_000\n[cleaning]\nexact_duplicates = true\nnear_duplicates = {{}}\n'
        f'[[source]]\nname = "gz"\npath = "{place}"\n'
    )

    def start(output):
        command = [sys.executable, "-c", PRE_PASS, str(recipe), str(tmp_path / output)]
        return subprocess.Popen(command, env={**os.environ, "PYTHONSAFEPATH": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    folder, deadline = tmp_path / "broken" / ".resume" / "cleaning", time.monotonic() + 100
    journal = folder / "gz" / "journal.jsonl.tmp"
    for more in (1, 3):
        process, before = start("broken"), journal.read_bytes().count(b"\n") if journal.is_file() else 0
        while process.poll() is None and time.monotonic() < deadline:
            if journal.is_file() and journal.read_bytes().count(b"\n") >= before + more:
                break
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        assert process.returncode == -signal.SIGKILL, process.stderr.read()
        assert not (folder / "result.json.tmp").exists()
    units = journal.read_bytes().count(b"\n")
    assert units >= 4
    for output in ("broken", "whole"):
        done = start(output)
        assert done.wait(100) == 0, done.stderr.read()
    assert output_bytes(tmp_path / "broken") == output_bytes(tmp_path / "whole")
    verdicts = np.fromfile(folder / "gz" / "verdict.tmp", np.uint8)
    assert len(verdicts) == 2000 and (verdicts == 1).nonzero()[0][-600:].tolist() == list(range(1400, 2000))


def test_a_function_is_not_read_twice(planted):
    source = {"name": "made", "function": "somewhere.py:documents"}
    with pytest.raises(UserError, match="a function, and cleaning reads every document twice"):
        load_recipe(
            None, ["output=out", "tokenizer=t", f"source={json.dumps([source]).replace(': ', ' = ')}", "cleaning.exact_duplicates=true"], PrepConfig
        )


def test_a_file_that_changes_after_the_pre_pass_is_refused(tokenizer_folder, tmp_path, monkeypatch):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"document number {number}"}) + "\n" for number in range(20)))
    recipe = tmp_path / "prep.toml"
    tables = {"output": str(tmp_path / "out"), "tokenizer": str(tokenizer_folder), "source": [{"name": "s", "paths": [str(path)]}]}
    recipe.write_text(tomli_w.dumps({**tables, "cleaning": {"exact_duplicates": True}}))
    whole = PrePass.run

    def then_changed(self, workers, result):
        whole(self, workers, result)
        path.write_text(path.read_text() + json.dumps({"text": "one more"}) + "\n")

    monkeypatch.setattr(PrePass, "run", then_changed)
    with pytest.raises(UserError, match="changed since cleaning read"):
        run(recipe)
