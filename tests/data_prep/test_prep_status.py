"""`prism status` of prepared data, while it is made and when it is there."""

import time

import pytest
from prep_cases import texts, write_kind

from megatron_prism.data_prep import prepare, tokenizer
from megatron_prism.data_prep.settings import PrepConfig, SourceConfig
from megatron_prism.status import text
from megatron_prism.status.command import look


def test_a_prep_run_says_how_much_of_its_input_is_done(tokenizer_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "prepare_tokenizer", tokenizer._prepare)
    documents = texts(60)
    write_kind(tmp_path / "in", "jsonl", documents)
    (tmp_path / "make.py").write_text("def documents():\n    yield from map(str, range(20_000))\n    raise RuntimeError('the source went away')\n")
    good = SourceConfig(name="good", paths=[str(tmp_path / "in" / "*.jsonl")])
    gone = SourceConfig(name="gone", function=f"{tmp_path / 'make.py'}:documents")
    config = PrepConfig(output=tmp_path / "out", tokenizer=tokenizer_folder, source=[good, gone], workers=1)
    with pytest.raises(Exception, match="the source went away"):
        prepare.prepare(config)
    size = sum(path.stat().st_size for path in (tmp_path / "in").glob("*.jsonl"))
    found = look(tmp_path / "out", time.time())
    assert (found.state, found.done, found.total, found.facts["documents"]) == ("running", size, size, 60)
    assert found.facts["tokens"] > 0 and "of input" in text.block(found)
    assert look(tmp_path / "out", time.time() + 7200).state == "dead"

    whole = config.model_copy(update={"source": (good,), "output": tmp_path / "whole"})
    prepare.prepare(whole)
    prepare.finish(whole)
    done = look(tmp_path / "whole", time.time())
    assert (done.state, done.exit) == ("finished", 0) and done.facts["documents"] == 60
    assert done.facts["sources"]["good"]["tokens"] == done.facts["tokens"] >= found.facts["tokens"]
