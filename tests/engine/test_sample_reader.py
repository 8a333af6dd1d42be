"""What a reader serves is the documents' own tokens, however many shards and sources they lie in."""

from pathlib import Path

import numpy as np
from tiny_blend import END_OF_DOCUMENT, counting_documents, write_source

from megatron_prism.data_prep.blend import Blend, BlendSource
from megatron_prism.engine.data import SampleReader

SEQ_LEN, VOCAB_SIZE = 48, 96


def test_a_source_of_hundreds_of_shards_reads_as_if_it_were_one(tmp_path):
    documents = counting_documents(np.random.default_rng(1), 300, VOCAB_SIZE)
    rows = {}
    for shards in (1, 300):
        write_source(tmp_path / str(shards), "a", "train", documents, VOCAB_SIZE, num_shards=shards)
        reader = SampleReader(Blend(3, (BlendSource("a", "d", 1.0, tmp_path / str(shards) / "a" / "train"),)), "train", SEQ_LEN, False)
        rows[shards] = np.concatenate([reader.tokens(index)[0][:-1] for index in range(220)])
    assert np.array_equal(rows[1], rows[300])
    whole = sorted((*document, END_OF_DOCUMENT) for document in documents)
    total = sum(len(document) for document in whole)
    assert len(rows[1]) > total
    ends = np.flatnonzero(rows[1][:total] == END_OF_DOCUMENT)
    assert sorted(tuple(part.tolist()) for part in np.split(rows[1][:total], ends + 1)[:-1]) == whole


def test_hundreds_of_sources_of_one_document_are_read_with_weights_a_million_apart(tmp_path):
    sources = []
    for number in range(200):
        write_source(tmp_path, f"s{number:03d}", "train", [[1 + number % 90] * (1 + number % 7)], VOCAB_SIZE, num_shards=1)
        sources.append(BlendSource(f"s{number:03d}", "d", 1.0 if number < 20 else 1e-6, Path(tmp_path / f"s{number:03d}" / "train")))
    reader = SampleReader(Blend(3, tuple(sources)), "train", SEQ_LEN, False)
    counts = np.zeros(200, int)
    for index in range(60):
        tokens, source = reader.tokens(index)
        counts[source] += 1
        assert set(tokens.tolist()) == {1 + source % 90, END_OF_DOCUMENT}
    assert counts.tolist() == reader.sampler.counts(60).tolist() == [3] * 20 + [0] * 180
